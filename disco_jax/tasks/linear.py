"""Train a classifier on a run, of frozen features or with all layers, and test it.

`linear`, `semi`, `transfer` and `finetune` are this one task with other settings.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors
from disco_jax.data.base import Source
from disco_jax.evaluate import features, grid, linear, online, saved, scores, target
from disco_jax.evaluate.classifier import Classifier
from disco_jax.evaluate.features import Features, TrainedModel
from disco_jax.report import build

AUGMENT = ("linear", "flip", "none")


def run(config: ConfigDict, workdir: str, source: Source | None = None) -> dict[str, Any]:
    """Probes or fine-tunes the newest checkpoint of the run in `workdir`.

    Writes NAME.json and NAME.npz (kernel, bias, confusion) there, NAME being `config.name`; a
    training that reads images keeps metrics and checkpoints in NAME/ and goes on from them.

    Args:
      config: see `common.classification`.
      workdir: a pretraining run's directory.
      source: images; None opens the run's own data, or what `config.data` names.

    Returns:
      {"top1", "top5", "top1_interval", "class_top1", "step", ...}, accuracies in percent.

    Raises:
      UserError: a setting, the run or the data will not do; nothing was trained.
    """
    trained = target.with_eval_data(features.load(workdir, config.network), config.data)
    _check(config, trained)
    teacher = saved.read(config.distill.teacher) if config.distill.teacher else None
    trained, source = target.opened(trained, source)
    _check_data(config, trained, source, teacher)
    source = target.few_labels(source, trained.config.data.train_split, config.labelled)
    if _reads_images(config):
        layer, result, found = _online(config, trained, source, workdir, teacher)
    else:
        train = _extract(config, trained, source, trained.config.data.train_split)
        test = _extract(config, trained, source, trained.config.data.eval_split)[0]
        target.match(source, train[0].labels, test.labels)
        layer, result = probe(config, train, test, source.num_classes)
        found = layer.scores(getattr(test, config.output)), test.labels
    result = {"step": trained.step, "name": config.name, "data": source.name, **result}
    result |= {field: config[field] for field in saved.READING}
    saved.write(
        workdir, config.name, result, **saved.arrays(layer), confusion=scores.confusion(*found)
    )
    if jax.process_index() == 0:
        print(f"{_TITLES[config.layers]}: {scores.line(result)} of {source.name}")
    build.refresh(config.report, workdir)
    return result


_TITLES = {"classifier": "Linear probe", "all": "Fine-tuned"}


def probe(
    config: ConfigDict,
    train: Features | list[Features],
    test: Features,
    num_classes: int | None = None,
) -> tuple[Classifier, dict[str, Any]]:
    """The trained layer and its results, on features at hand.

    Args:
      config: see `common.classification`.
      train: of the training images, or also of their mirror images.
      test: of the test images.
      num_classes: C; None: as the labels have them.
    """
    variants = [train] if isinstance(train, Features) else train
    rows = [getattr(found, config.output) for found in variants]
    labels, tested = variants[0].labels, getattr(test, config.output)
    classes = num_classes or int(max(labels.max(), test.labels.max())) + 1
    if config.grid.rates:
        layer, result = grid.train(config, rows[0], labels, classes)
    else:
        looks = (tested, test.labels) if config.evaluate_every_epochs else None
        layer, result = linear.train(config, rows, labels, classes, test=looks)
    summary = scores.summary(layer.scores(tested), test.labels)
    train_top1 = scores.top_k(layer.scores(rows[0]), labels, 1)
    return layer, {**summary, **result, "train_top1": train_top1}


def _reads_images(config: ConfigDict) -> bool:
    """Whether features change from epoch to epoch, so that they cannot be extracted once."""
    return config.augment == "linear" or config.layers == "all" or bool(config.distill.weight)


def _check(config: ConfigDict, trained: TrainedModel) -> None:
    """Refuses settings that do not go together, before anything is read."""
    if config.augment not in AUGMENT:
        raise errors.unknown("config.augment", config.augment, AUGMENT)
    if _reads_images(config) and config.augment != "linear":
        raise errors.UserError(
            f"config.augment={config.augment!r} extracts features once, which fine-tuning and "
            "distillation cannot use: set --config.augment=linear."
        )
    if config.grid.rates and (
        config.augment == "flip" or config.layers == "all" or config.distill.weight
    ):
        raise errors.UserError(
            "config.grid trains layers on frozen features by labels alone: set augment to none or "
            "linear, layers to classifier and distill.weight to 0."
        )
    backbone = trained.config.student.backbone
    if config.student not in ("", backbone):
        raise errors.UserError(
            f"The settings are for config.student={config.student!r}, but the run's network is "
            f"{backbone!r}: give student={backbone} behind the recipe's colon."
        )
    online.check(config, trained)


def _check_data(
    config: ConfigDict, trained: TrainedModel, source: Source, teacher: online.Teacher | None
) -> None:
    data = trained.config.data
    if _reads_images(config):
        target.check_labels(source, data.train_split, data.eval_split, data.source != "tfds")
    if teacher is not None and len(teacher.classifier.bias) != source.num_classes:
        raise errors.UserError(
            f"config.distill.teacher={config.distill.teacher!r} tells "
            f"{len(teacher.classifier.bias)} classes apart, {source.name} has "
            f"{source.num_classes}: take a teacher that was trained on this data set."
        )


def _extract(
    config: ConfigDict, trained: TrainedModel, source: Source, split: str
) -> list[Features]:
    """Features of a split; of the training split with `augment="flip"` also those mirrored."""
    both = config.augment == "flip" and split == trained.config.data.train_split
    return [
        features.of_split(
            trained,
            source,
            split,
            config.extract_batch_size,
            (config.output,),
            config.blocks,
            mirrored=mirrored,
        )
        for mirrored in ((False, True) if both else (False,))
    ]


def _online(
    config: ConfigDict,
    trained: TrainedModel,
    source: Source,
    workdir: str,
    teacher: online.Teacher | None,
) -> tuple[Classifier, dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    data = trained.config.data
    how = online.plan(config, trained, source)
    best = linear.Best(how.steps_per_epoch)
    folder = epath.Path(workdir) / config.name

    def tested(network: TrainedModel, layer: Classifier) -> tuple[np.ndarray, np.ndarray]:
        found = _extract(config, network, source, data.eval_split)[0]
        return layer.scores(getattr(found, config.output)), found.labels

    def eval_fn(step: int, network: TrainedModel, layer: Classifier) -> Mapping[str, float]:
        return best(step, *tested(network, layer))

    looks = dict(
        eval_fn=eval_fn, eval_every_steps=config.evaluate_every_epochs * how.steps_per_epoch
    )
    network = trained
    search: dict[str, Any] = {}
    if config.grid.rates:
        layer, search = grid.train_online(config, trained, source, str(folder), **looks)
    else:
        network, layer = online.train(
            config, trained, source, str(folder), teacher=teacher, **looks
        )
    found = tested(network, layer)
    for line in saved.metrics(str(folder)):
        if "test/top1" in line:
            best.note(line["step"], line["test/top1"])
    return layer, {**scores.summary(*found), **search, **best.result}, found
