"""Whether a run learns: kNN accuracy of the student while it trains."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from disco_jax import errors
from disco_jax.data.base import Source
from disco_jax.data.subset import SubsetSource, read_labels
from disco_jax.evaluate import features, knn, subsets
from disco_jax.evaluate.features import Trained
from disco_jax.models.encoder import Encoder

_AMONG = 10  # times as many images are looked at for a sample, where all are too many to read


def check(config: ConfigDict, source: Source) -> None:
    """Refuses a split that kNN cannot be taken in, before the run begins.

    Raises:
      UserError: no such split, an empty one, one without labels, or too few images.
    """
    monitor = config.monitor
    if not monitor.knn_every_steps:
        return
    split = _split(config)
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


def sample(config: ConfigDict, source: Source) -> tuple[Source, str]:
    """The images that are scored, always the same for a seed, as a split of a source.

    `config.monitor.images` of them, evenly over the classes: the first in the stored order would
    be the first classes of a folder. Reads the labels of the split once (of a large one of TFDS,
    those of a part) and keeps the sample as it is stored.

    Args:
      config: of the run; `monitor` has the fields split, images and k.
      source: its images.

    Raises:
      UserError: an image has no label.
    """
    split, most = _split(config), config.monitor.images
    if not most or most >= source.count(split):
        return source, split
    split = source.part(split, _AMONG * most, config.seed)
    labels = read_labels(source, split)
    if (labels < 0).any():
        raise features.unlabelled(source, split)
    rows = subsets.even(labels, most, config.seed)
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    return SubsetSource(source, split, rows, **hosts), split


def knn_of(
    config: ConfigDict,
    encoder: Encoder,
    source: Source,
    drawn: Callable[[], tuple[Source, str]] | None = None,
) -> Callable[[int, Any], dict[str, float]]:
    """What the loop calls: (step, `TrainState`) -> {"knn/top1": percent}.

    Args:
      config: of the run; `monitor` has the fields split, images and k.
      encoder: the student.
      source: its images.
      drawn: gives what `sample` does, where several runs share it; None: of this run alone.
    """
    drawn = drawn or functools.cache(lambda: sample(config, source))

    def look(step: int, state: Any) -> dict[str, float]:
        trained = Trained(encoder, state.student, config, step)
        found = features.of_split(trained, *drawn(), config.batch_size, ("features",))
        return {"knn/top1": knn.leave_one_out(found.features, found.labels, config.monitor.k)}

    return look


def _split(config: ConfigDict) -> str:
    """The split whose images are scored."""
    return config.monitor.split or config.data.eval_split
