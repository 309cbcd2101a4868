"""The split that a run evaluates with kNN while it trains."""

from disco_jax import errors
from disco_jax.data.contract import Source
from disco_jax.train.run_settings import RunSettings


def split_of(settings: RunSettings) -> str:
    """Returns the name of the evaluated split."""
    return settings.monitor.split or settings.data.eval_split


def check(settings: RunSettings, source: Source) -> None:
    """Checks, before the run begins, that kNN can be computed on the split.

    Raises:
      UserError: if the split does not exist, is empty or unlabelled, or has too few images.
    """
    monitor = settings.monitor
    if not monitor.knn_every_steps:
        return
    split = split_of(settings)
    count = min(source.count(split), monitor.images or source.count(split))
    if source.num_classes is None:
        raise errors.UserError(
            f"config.monitor.knn_every_steps={monitor.knn_every_steps} needs labels, but "
            f"{source.name} has none: set it to 0, or give labelled images (a folder needs one "
            "sub-folder per class)."
        )
    if not monitor.k < count:
        raise errors.UserError(
            f"config.monitor.k={monitor.k} must be below the {count} images that are evaluated "
            f"in the split {split!r} of {source.name} (config.monitor.images={monitor.images})."
        )
