"""Data set of an evaluation: the run's own or another one, checked before anything is trained."""

import dataclasses
from typing import Any

import jax
import numpy as np

from disco_jax import errors
from disco_jax.configs import data as datasets
from disco_jax.data import pipeline
from disco_jax.data.contract import Source
from disco_jax.data.data_settings import DataSettings
from disco_jax.data.subset import SubsetSource, read_labels
from disco_jax.evaluate import features, subsets
from disco_jax.evaluate.features import TrainedModel
from disco_jax.evaluate.probe_settings import (
    EvalDataSettings,
    HeldOutSettings,
    LabelledSettings,
)

_TEST_SPLITS = ("validation", "test", "val")


def with_eval_data(trained: TrainedModel, data: EvalDataSettings) -> TrainedModel:
    """Replaces the run's data by the data that an evaluation's config specifies.

    Args:
      trained: network of a run.
      data: texts may be "" for the run's, `size` 0 for the run's and `eval_resize` -1 for the run's
        (for another data set or size that of the data set at its own size, else the size, so that
        the shorter side is cropped to a square).

    Returns:
      The same network; its `data` and `augment` define how images are read.
    """
    settings = trained.settings
    changes: dict[str, Any] = {}
    is_other = bool(data.source or data.name or data.dir)
    if is_other:
        kind = "npz" if str(data.dir).endswith(".npz") else "folder" if data.dir else "tfds"
        kind = data.source or ("tfds" if data.name else kind)
        changes = dict(
            source=kind, name=data.name, dir=data.dir, train_split="train", eval_split="", subset=""
        )
        changes |= dict(splits="", labels="", range="full")
    for field in ("train_split", "eval_split", "subset", "splits", "labels", "range"):
        if value := getattr(data, field):
            changes[field] = value
    augment = settings.augment
    if data.size:
        augment = dataclasses.replace(augment, size=data.size)
    if data.interpolation:
        augment = dataclasses.replace(augment, interpolation=data.interpolation)
    if data.interpolation or data.eval_interpolation:
        changes["eval_interpolation"] = data.eval_interpolation
    if data.eval_resize >= 0:
        changes["eval_resize"] = data.eval_resize
    elif is_other or data.size:
        changes["eval_resize"] = _eval_resize(data.name, augment.size)
    images = dataclasses.replace(settings.data, **changes)
    settings = dataclasses.replace(settings, data=images, augment=augment)
    return dataclasses.replace(trained, settings=settings)


def _eval_resize(name: str, size: int) -> int:
    """Returns the shorter side in px before the centre crop of `size` px is evaluated.

    Args:
      name: TFDS name of the data set, or "".
      size: side of the crop in px.
    """
    own = datasets.DATA.get(datasets.family(name), {})
    resize: int = own["eval_resize"] if own.get("size") == size else size
    return resize


def with_eval_split(trained: TrainedModel, split: str) -> TrainedModel:
    """Returns the network with another split to test on."""
    data = dataclasses.replace(trained.settings.data, eval_split=split)
    settings = dataclasses.replace(trained.settings, data=data)
    return dataclasses.replace(trained, settings=settings)


def opened(trained: TrainedModel, source: Source | None = None) -> tuple[TrainedModel, Source]:
    """Opens the data of a network's settings, and fills in the test split there.

    Checks everything that needs no images to be read.

    Raises:
      UserError: if the data or a split does not exist, a split is empty, or nothing is labelled.
    """
    data = trained.settings.data
    source = source or pipeline.open_source(data)
    if not data.eval_split:
        trained = with_eval_split(trained, _test_split(source))
        data = trained.settings.data
    for split in (data.train_split, data.eval_split):
        if not source.count(split):
            raise errors.UserError(f"Split {split!r} of {source.name} is empty.")
    if source.num_classes is None:
        raise features.unlabelled(source, data.train_split)
    return trained, source


def few_labels(
    source: Source, data: DataSettings, labelled: LabelledSettings
) -> tuple[Source, dict[str, Any]]:
    """Restricts the training split to the labelled images of `config.labelled`, and names them.

    Args:
      source: images.
      data: `config.data` of the run, as changed for the evaluation; a list in `subset` has already
        selected images.
      labelled: see `_check_list` for `listed`.

    Returns:
      The source with a class-balanced subset of the split, or `source` itself; and {"images": their
      number, "selection": e.g. "12 of each class, drawn with seed 0"}.

    Raises:
      UserError: if both percent and per_class are set, a class has too few images, or the list has
        another length than the papers'.
    """
    if labelled.percent and labelled.per_class:
        raise errors.UserError(
            f"config.labelled.percent={labelled.percent} and config.labelled.per_class="
            f"{labelled.per_class} are both set: set one of them to 0."
        )
    split = data.train_split
    _check_list(source.count(split), data, labelled)
    if not labelled.percent and not labelled.per_class:
        selection = f"the list {data.subset}" if data.subset else f"all of {source.name}"
        return source, {"images": source.count(split), "selection": selection}
    labels = read_labels(source, split)
    if (labels < 0).any():
        raise features.unlabelled(source, split)
    if labelled.percent:
        rows = subsets.share(labels, labelled.percent, labelled.seed)
    else:
        rows = subsets.balanced(labels, labelled.per_class, labelled.seed)
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    each = len(rows) // len(np.unique(labels))
    selection = f"{each} of each class, drawn with seed {labelled.seed}"
    if labelled.listed and datasets.is_imagenet(data.name):
        selection += f"; the papers' list has {labelled.listed} images"
    return SubsetSource(source, split, rows, **hosts), {
        "images": len(rows),
        "selection": selection,
    }


def held_out(source: Source, split: str, settings: HeldOutSettings) -> np.ndarray | None:
    """Draws the training images on which an evaluation tests instead of the test images.

    Args:
      source: labelled images; the split is read once.
      split: split to train on.
      settings: number of images and seed.

    Returns:
      bool[N], true for the held-out images in the stored order; None without any.

    Raises:
      UserError: a label is missing, or a class has too few images.
    """
    if not settings.per_class:
        return None
    labels = read_labels(source, split)
    if (labels < 0).any():
        raise features.unlabelled(source, split)
    mask = np.zeros(len(labels), bool)
    mask[subsets.balanced(labels, settings.per_class, settings.seed)] = True
    match(source, labels[~mask], labels[mask])
    return mask


def _check_list(count: int, data: DataSettings, labelled: LabelledSettings) -> None:
    """Checks that a list of ImageNet's labelled images is as long as the papers'.

    Args:
      count: number of images in the training split.
      data: `config.data`; other data sets have other lists.
      labelled: `listed` is the length of the papers' list, 0 for any length.

    Raises:
      UserError: the list is shorter or longer, or labelled images would be drawn from it.
    """
    listed = data.subset or datasets.is_part(data.name)
    if not listed or not labelled.listed or not datasets.is_imagenet(data.name):
        return
    where = f"config.data.subset={data.subset!r}" if data.subset else f"{data.name}"
    if labelled.percent or labelled.per_class:
        raise errors.UserError(
            f"{where} has the labelled images only, and "
            f"config.labelled.percent={labelled.percent:g} would draw some of them: set "
            "--config.labelled.percent=0, or --config.labelled.listed=0 to draw from them."
        )
    if count != labelled.listed:
        raise errors.UserError(
            f"{where} has {count} images, the papers' list of "
            f"ImageNet {labelled.listed}: take the whole list (DisCo's script drops its first "
            "line), or set --config.labelled.listed=0 for a list of your own."
        )


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
