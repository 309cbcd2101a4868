"""Train and test a classifier on a run: on frozen features, or with all layers.

The commands `linear`, `semi`, `transfer` and `finetune` are this task with different configs.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors
from disco_jax.data.contract import Source
from disco_jax.evaluate import features, grid, linear, online, probe, saved, scores, target
from disco_jax.evaluate.classifier import Classifier
from disco_jax.evaluate.features import Features, TrainedModel
from disco_jax.report import build

AUGMENT = ("linear", "flip", "none")


def run(config: ConfigDict, workdir: str, source: Source | None = None) -> dict[str, Any]:
    """Probes or fine-tunes the newest checkpoint of the run in `workdir`.

    Writes NAME.json and NAME.npz (kernel, bias, confusion) there. NAME is `config.name`. A training
    that reads images saves metrics and checkpoints in NAME/ and resumes from them.

    Args:
      config: see `probes.classification`.
      workdir: a pretraining run's directory.
      source: images; None opens the data of the run, changed by `config.data`.

    Returns:
      {"top1", "top5", "top1_interval", "class_top1", "step", ...}, accuracies in percent.

    Raises:
      UserError: a setting, the run or the data is invalid; nothing was trained.
    """
    trained = target.with_eval_data(features.load(workdir, config.network), config.data)
    _check(config, trained)
    teacher = saved.read(config.distill.teacher) if config.distill.teacher else None
    trained, source = target.opened(trained, source)
    _check_data(config, trained, source, teacher)
    source = target.few_labels(source, trained.config.data.train_split, config.labelled)
    if _reads_images(config):
        layer, result, outputs = _online(config, trained, source, workdir, teacher)
    else:
        train = _extract(config, trained, source, trained.config.data.train_split)
        test = _extract(config, trained, source, trained.config.data.eval_split)[0]
        target.match(source, train[0].labels, test.labels)
        layer, result = probe.linear_probe(config, train, test, source.num_classes)
        outputs = layer.scores(getattr(test, config.output)), test.labels
    result = {"step": trained.step, "name": config.name, "data": source.name, **result}
    result |= {field: config[field] for field in saved.READING}
    saved.write(
        workdir, config.name, result, **saved.arrays(layer), confusion=scores.confusion(*outputs)
    )
    if jax.process_index() == 0:
        print(f"{_TITLES[config.layers]}: {scores.line(result)} of {source.name}")
    build.refresh(config.report, workdir)
    return result


_TITLES = {"classifier": "Linear probe", "all": "Fine-tuned"}


def _reads_images(config: ConfigDict) -> bool:
    """Returns True if features change between epochs, so that they cannot be extracted once."""
    return config.augment == "linear" or config.layers == "all" or bool(config.distill.weight)


def _check(config: ConfigDict, trained: TrainedModel) -> None:
    """Checks that the settings are compatible, before any data are read."""
    if config.augment not in AUGMENT:
        raise errors.unknown("config.augment", config.augment, AUGMENT)
    if _reads_images(config) and config.augment != "linear":
        raise errors.UserError(
            f"config.augment={config.augment!r} extracts features once, but fine-tuning and "
            "distillation need new features in every epoch: set --config.augment=linear."
        )
    if config.grid.rates and (
        config.augment == "flip" or config.layers == "all" or config.distill.weight
    ):
        raise errors.UserError(
            "config.grid trains classifiers on frozen features with labels only: set augment to "
            "none or linear, layers to classifier and distill.weight to 0."
        )
    backbone = trained.config.student.backbone
    if config.student not in ("", backbone):
        raise errors.UserError(
            f"The settings are for config.student={config.student!r}, but the run's backbone is "
            f"{backbone!r}: set the recipe's argument, --config=RECIPE:student={backbone}."
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
            f"config.distill.teacher={config.distill.teacher!r} has "
            f"{len(teacher.classifier.bias)} classes, {source.name} has "
            f"{source.num_classes}: give a teacher that was trained on this data set."
        )


def _extract(
    config: ConfigDict, trained: TrainedModel, source: Source, split: str
) -> list[Features]:
    """Extracts the features of a split, and of mirrored training images if augment="flip"."""
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
    """Trains on images; returns the classifier, its results, and test scores with labels."""
    data = trained.config.data
    plan = online.plan(config, trained, source)
    best = linear.Best(plan.steps_per_epoch)
    folder = epath.Path(workdir) / config.name

    def test(network: TrainedModel, layer: Classifier) -> tuple[np.ndarray, np.ndarray]:
        extracted = _extract(config, network, source, data.eval_split)[0]
        return layer.scores(getattr(extracted, config.output)), extracted.labels

    def evaluate(step: int, network: TrainedModel, layer: Classifier) -> Mapping[str, float]:
        return best(step, *test(network, layer))

    evaluation = dict(
        eval_fn=evaluate, eval_every_steps=config.evaluate_every_epochs * plan.steps_per_epoch
    )
    network = trained
    search: dict[str, Any] = {}
    if config.grid.rates:
        layer, search = grid.train_online(config, trained, source, str(folder), **evaluation)
    else:
        network, layer = online.train(
            config, trained, source, str(folder), teacher=teacher, **evaluation
        )
    outputs = test(network, layer)
    for line in saved.metrics(str(folder)):
        if "test/top1" in line:
            best.note(line["step"], line["test/top1"])
    return layer, {**scores.summary(*outputs), **search, **best.result}, outputs
