"""What a network is evaluated on: its run's own data set or another, checked beforehand."""

import dataclasses
from typing import Any

import jax
import numpy as np

from disco_jax import errors
from disco_jax.data import pipeline
from disco_jax.data.base import Source
from disco_jax.data.subset import SubsetSource, read_labels
from disco_jax.evaluate import features, subsets
from disco_jax.evaluate.features import Trained

_EVALUATED = ("validation", "test", "val")


def aimed(trained: Trained, data: Any) -> Trained:
    """The network with the data that an evaluation's config names instead of its run's.

    Args:
      trained: of a run.
      data: fields source, name, dir, train_split, eval_split, interpolation, subset, splits,
        labels, range ("": the run's), size (0: the run's) and eval_resize (-1: the run's; of
        another data set or size: the size, so that the shorter side is cut to a square).

    Returns:
      The same network; `config.data` and `config.augment` say how images are read.
    """
    config = trained.config.copy_and_resolve_references()
    other = bool(data.source or data.name or data.dir)
    if other:
        kind = "npz" if str(data.dir).endswith(".npz") else "folder" if data.dir else "tfds"
        kind = data.source or ("tfds" if data.name else kind)
        config.data.update(
            source=kind, name=data.name, dir=data.dir, train_split="train", eval_split="", subset=""
        )
        config.data.update(splits="", labels="", range="full")
    for field in ("train_split", "eval_split", "subset", "splits", "labels", "range"):
        if given := data.get(field):
            config.data[field] = given
    if data.size:
        config.augment.size = data.size
    if data.interpolation:
        config.augment.interpolation = data.interpolation
    if data.eval_resize >= 0:
        config.data.eval_resize = data.eval_resize
    elif other or data.size:
        config.data.eval_resize = config.augment.size
    return dataclasses.replace(trained, config=config)


def opened(trained: Trained, source: Source | None = None) -> tuple[Trained, Source]:
    """The data that `trained.config` names, and the config with its test split filled in.

    Everything that can be known without reading images is checked here.

    Raises:
      UserError: no such data or split, an empty one, or nothing labelled.
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
    """The source with a class-balanced part of `split`, if `config.labelled` asks for one.

    Args:
      source: images.
      split: what is trained on.
      labelled: fields percent and per_class (0: all), and seed.

    Raises:
      UserError: both are set, or a class has too few.
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
    """Refuses labels that would only turn out wrong at the end of a long training.

    Args:
      source: images.
      train_split: what is trained on.
      eval_split: what is tested on; its labels are read.
      thorough: read those of `train_split` too, which takes minutes where they lie beside the
        images of ImageNet.

    Raises:
      UserError: images without a label, or classes that are tested and not trained.
    """
    splits = (train_split, eval_split) if thorough else (eval_split,)
    found = {split: read_labels(source, split) for split in splits}
    for split, labels in found.items():
        if (labels < 0).any():
            raise features.unlabelled(source, split)
    if thorough:
        match(source, found[train_split], found[eval_split])


def match(source: Source, train: np.ndarray, test: np.ndarray) -> None:
    """Refuses a test split with classes that the training split lacks.

    Args:
      source: for its name.
      train: i32[N] labels.
      test: i32[M] labels.
    """
    strange = sorted(set(test.tolist()) - set(train.tolist()))
    if strange:
        raise errors.UserError(
            f"{source.name}: {len(strange)} classes of the test split have no training image, "
            f"class {strange[0]} for one. For folders: the sub-folders of both splits must bear "
            "the same names. Set config.data.train_split and config.data.eval_split."
        )


def _test_split(source: Source) -> str:
    there = [name for name in _EVALUATED if name in source.splits]
    if len(there) == 1:
        return there[0]
    raise errors.UserError(
        f"config.data.eval_split is not set, and {source.name} has the splits "
        f"{', '.join(source.splits)}: choose the one to test on."
    )
