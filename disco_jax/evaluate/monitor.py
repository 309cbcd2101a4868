"""Whether a run learns: kNN accuracy of the student while it trains."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from disco_jax import errors
from disco_jax.data.base import Source
from disco_jax.evaluate import features, knn
from disco_jax.evaluate.features import Trained
from disco_jax.models.encoder import Encoder


def check(config: ConfigDict, source: Source) -> None:
    """Refuses a split that kNN cannot be taken in, before the run begins.

    Raises:
      UserError: no such split, an empty one, one without labels, or too few images.
    """
    monitor = config.monitor
    if not monitor.knn_every_steps:
        return
    split = monitor.split or config.data.eval_split
    count = min(source.count(split), monitor.images or source.count(split))
    if source.num_classes is None:
        raise errors.UserError(
            f"config.monitor.knn_every_steps={monitor.knn_every_steps}, but {source.name} has no "
            "labels to compare with: set it to 0, or give labelled images (for a folder, one "
            "sub-folder a class)."
        )
    if not monitor.k < count:
        raise errors.UserError(
            f"config.monitor.k={monitor.k} must be below the {count} images that are looked at "
            f"in the split {split!r} of {source.name} (config.monitor.images={monitor.images})."
        )


def knn_of(
    config: ConfigDict, encoder: Encoder, source: Source
) -> Callable[[int, Any], dict[str, float]]:
    """What the loop calls: (step, `TrainState`) -> {"knn/top1": percent}.

    Args:
      config: of the run; `monitor` has the fields split, images and k.
      encoder: the student.
      source: its images.
    """
    split = config.monitor.split or config.data.eval_split

    def look(step: int, state: Any) -> dict[str, float]:
        trained = Trained(encoder, state.student, config, step)
        found = features.of_split(
            trained, source, split, config.batch_size, ("features",), limit=config.monitor.images
        )
        return {"knn/top1": knn.leave_one_out(found.features, found.labels, config.monitor.k)}

    return look
