"""kNN accuracy of the student during training, to see whether a run learns."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from disco_jax.data.contract import Source
from disco_jax.data.subset import SubsetSource, read_labels
from disco_jax.evaluate import features, knn, subsets
from disco_jax.evaluate.features import TrainedModel
from disco_jax.models.encoder import Encoder
from disco_jax.train import monitored
from disco_jax.train.run_settings import RunSettings

_POOL_FACTOR = 10  # a sample is drawn from this many times its size, not from a whole large split


def sample(settings: RunSettings, source: Source) -> tuple[Source, str]:
    """Draws the evaluated images, always the same ones for a seed, as a split of a source.

    Draws `config.monitor.images` of them, evenly over the classes, because the first images in the
    stored order of a folder belong to its first classes. Reads the labels of the split once (of a
    large TFDS split, those of a part of it) and keeps the sampled images in their stored encoding.

    Args:
      settings: settings of the run.
      source: images of the run.

    Raises:
      UserError: if an image has no label.
    """
    split, max_images = monitored.split_of(settings), settings.monitor.images
    if not max_images or max_images >= source.count(split):
        return source, split
    split = source.part(split, _POOL_FACTOR * max_images, settings.seed)
    labels = read_labels(source, split)
    if (labels < 0).any():
        raise features.unlabelled(source, split)
    rows = subsets.even(labels, max_images, settings.seed)
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    return SubsetSource(source, split, rows, **hosts), split


def knn_of(
    settings: RunSettings,
    encoder: Encoder,
    source: Source,
    drawn: Callable[[], tuple[Source, str]] | None = None,
) -> Callable[[int, Any], dict[str, float]]:
    """Builds the loop's evaluation function (step, `TrainState`) -> {"knn/top1": percent}.

    Args:
      settings: settings of the run.
      encoder: the student.
      source: images of the run.
      drawn: returns the result of `sample`, for runs that share it; None draws it for this run.
    """
    drawn = drawn or functools.cache(lambda: sample(settings, source))

    def eval_fn(step: int, state: Any) -> dict[str, float]:
        trained = TrainedModel(encoder, state.student, settings, step)
        encoded = features.of_split(trained, *drawn(), settings.batch_size, ("features",))
        return {"knn/top1": knn.leave_one_out(encoded.features, encoded.labels, settings.monitor.k)}

    return eval_fn
