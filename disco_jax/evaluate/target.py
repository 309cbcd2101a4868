"""Data set of an evaluation: the run's own or another one, checked before anything is trained."""

import dataclasses
from typing import Any

import jax
import numpy as np

from disco_jax import errors
from disco_jax.data import pipeline
from disco_jax.data.contract import Source
from disco_jax.data.subset import SubsetSource, read_labels
from disco_jax.evaluate import features, subsets
from disco_jax.evaluate.features import TrainedModel

_TEST_SPLITS = ("validation", "test", "val")


def with_eval_data(trained: TrainedModel, data: Any) -> TrainedModel:
    """Replaces the run's data by the data that an evaluation's config specifies.

    Args:
      trained: network of a run.
      data: fields source, name, dir, train_split, eval_split, interpolation, subset, splits,
        labels, range ("": the run's), size (0: the run's) and eval_resize (-1: the run's; for
        another data set or size it defaults to the size, so that the shorter side is cropped to a
        square).

    Returns:
      The same network; its `config.data` and `config.augment` define how images are read.
    """
    config = trained.config.copy_and_resolve_references()
    is_other = bool(data.source or data.name or data.dir)
    if is_other:
        kind = "npz" if str(data.dir).endswith(".npz") else "folder" if data.dir else "tfds"
        kind = data.source or ("tfds" if data.name else kind)
        config.data.update(
            source=kind, name=data.name, dir=data.dir, train_split="train", eval_split="", subset=""
        )
        config.data.update(splits="", labels="", range="full")
    for field in ("train_split", "eval_split", "subset", "splits", "labels", "range"):
        if value := data.get(field):
            config.data[field] = value
    if data.size:
        config.augment.size = data.size
    if data.interpolation:
        config.augment.interpolation = data.interpolation
    if data.eval_resize >= 0:
        config.data.eval_resize = data.eval_resize
    elif is_other or data.size:
        config.data.eval_resize = config.augment.size
    return dataclasses.replace(trained, config=config)


def opened(trained: TrainedModel, source: Source | None = None) -> tuple[TrainedModel, Source]:
    """Opens the data of `trained.config`, and fills in the test split of the config.

    Checks everything that needs no images to be read.

    Raises:
      UserError: if the data or a split does not exist, a split is empty, or nothing is labelled.
    """
    config = trained.config
    source = source or pipeline.open_source(config.data)
    if not config.data.eval_split:
        config.data.eval_split = _test_split(source)
    for split in (config.data.train_split, config.data.eval_split):
        if not source.count(split):
            raise errors.UserError(f"Split {split!r} of {source.name} is empty.")
    if source.num_classes is None:
        raise features.unlabelled(source, config.data.train_split)
    return trained, source


def few_labels(source: Source, split: str, labelled: Any) -> Source:
    """Returns the source with a class-balanced subset of `split`, if `config.labelled` is set.

    Args:
      source: images.
      split: split to train on.
      labelled: fields percent and per_class (0: all images), and seed.

    Raises:
      UserError: if both are set, or a class has too few images.
    """
    if labelled.percent and labelled.per_class:
        raise errors.UserError(
            f"config.labelled.percent={labelled.percent} and config.labelled.per_class="
            f"{labelled.per_class} are both set: set one of them to 0."
        )
    if not labelled.percent and not labelled.per_class:
        return source
    labels = read_labels(source, split)
    if (labels < 0).any():
        raise features.unlabelled(source, split)
    if labelled.percent:
        rows = subsets.share(labels, labelled.percent, labelled.seed)
    else:
        rows = subsets.balanced(labels, labelled.per_class, labelled.seed)
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    return SubsetSource(source, split, rows, **hosts)


def check_labels(source: Source, train_split: str, eval_split: str, thorough: bool) -> None:
    """Checks labels whose errors would otherwise appear only at the end of a long training.

    Args:
      source: images.
      train_split: split to train on.
      eval_split: split to test on; its labels are read.
      thorough: whether to read the labels of `train_split`, too. This takes minutes for ImageNet
        if the labels are stored beside the images.

    Raises:
      UserError: if images have no label, or a tested class is never trained.
    """
    splits = (train_split, eval_split) if thorough else (eval_split,)
    by_split = {split: read_labels(source, split) for split in splits}
    for split, labels in by_split.items():
        if (labels < 0).any():
            raise features.unlabelled(source, split)
    if thorough:
        match(source, by_split[train_split], by_split[eval_split])


def match(source: Source, train: np.ndarray, test: np.ndarray) -> None:
    """Checks that every class of the test split occurs in the training split.

    Args:
      source: provides the name for the error message.
      train: i32[N], labels.
      test: i32[M], labels.

    Raises:
      UserError: names a class without training images.
    """
    untrained = sorted(set(test.tolist()) - set(train.tolist()))
    if untrained:
        raise errors.UserError(
            f"{source.name}: {len(untrained)} classes of the test split have no training image, "
            f"e.g. class {untrained[0]}. In a folder, the sub-folders of both splits need the same "
            "names. Check config.data.train_split and config.data.eval_split."
        )


def _test_split(source: Source) -> str:
    matches = [name for name in _TEST_SPLITS if name in source.splits]
    if len(matches) == 1:
        return matches[0]
    raise errors.UserError(
        f"config.data.eval_split is not set, and {source.name} has the splits "
        f"{', '.join(source.splits)}: set it to the split to test on."
    )
