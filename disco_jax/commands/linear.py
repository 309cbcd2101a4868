"""Train and test a classifier on a run: on frozen features, or with all layers.

The commands `linear`, `semi`, `transfer` and `finetune` are this task with different configs.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors, typed
from disco_jax.data.contract import Source
from disco_jax.evaluate import (
    features,
    grid,
    held_out,
    linear,
    online,
    probe,
    protocols,
    saved,
    scores,
    target,
)
from disco_jax.evaluate.classifier import Classifier
from disco_jax.evaluate.features import Features, TrainedModel
from disco_jax.evaluate.probe_settings import ProbeSettings
from disco_jax.report import build, runs

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
    settings = typed.parse(ProbeSettings, config, defaults=True)
    trained = target.with_eval_data(features.load(workdir, settings.network), settings.data)
    config = protocols.fit(config, trained)
    settings = typed.parse(ProbeSettings, config, defaults=True)
    _check(settings, trained)
    teacher = saved.read(settings.distill.teacher) if settings.distill.teacher else None
    trained, source = target.opened(trained, source)
    _check_data(settings, trained, source, teacher)
    source, labelled = target.few_labels(source, trained.settings.data, settings.labelled)
    if settings.labelled.listed and jax.process_index() == 0:
        print(f"Labelled images: {labelled['images']} ({labelled['selection']}).")
    trained, source, mask = _hold_out(settings, trained, source)
    if _reads_images(settings):
        layer, result, outputs = _online(settings, trained, source, workdir, teacher)
    else:
        layer, result, outputs = _cached(settings, trained, source, mask)
    result = {"step": trained.step, "name": settings.name, "data": source.name, **result}
    result |= {field: getattr(settings, field) for field in saved.READING}
    result |= {"protocol": settings.protocol, "cached": not _reads_images(settings)}
    result["trained_on"] = labelled
    if mask is not None:
        result["tested_on"] = (
            f"{settings.held_out.per_class} training images of each class, drawn with seed "
            f"{settings.held_out.seed}"
        )
    result |= saved.settings(config)
    saved.write(
        workdir, settings.name, result, **saved.arrays(layer), confusion=scores.confusion(*outputs)
    )
    _print(settings, result)
    build.refresh(settings.report, workdir)
    return result


def _print(settings: ProbeSettings, result: Mapping[str, Any]) -> None:
    """Prints the result on process 0, with a label if features were cached."""
    if jax.process_index():
        return
    cached = f" on {runs.CACHED}" if result["cached"] else ""
    print(f"{_TITLES[settings.layers]}{cached}: {scores.line(result)} of {result['data']}")
    if "tested_on" in result:
        print(f"Tested on {result['tested_on']}.")


_TITLES = {"classifier": "Linear probe", "all": "Fine-tuned"}


def _reads_images(settings: ProbeSettings) -> bool:
    """Returns True if features change between epochs, so that they cannot be extracted once."""
    return settings.augment == "linear" or settings.layers == "all" or bool(settings.distill.weight)


def _check(settings: ProbeSettings, trained: TrainedModel) -> None:
    """Checks that the settings are compatible, before any data are read."""
    if settings.augment not in AUGMENT:
        raise errors.unknown("config.augment", settings.augment, AUGMENT)
    if _reads_images(settings) and settings.augment != "linear":
        raise errors.UserError(
            f"config.augment={settings.augment!r} extracts features once, but fine-tuning and "
            "distillation need new features in every epoch: set --config.augment=linear."
        )
    if settings.grid.rates and (
        settings.augment == "flip" or settings.layers == "all" or settings.distill.weight
    ):
        raise errors.UserError(
            "config.grid trains classifiers on frozen features with labels only: set augment to "
            "none or linear, layers to classifier and distill.weight to 0."
        )
    searched_online = settings.grid.rates and _reads_images(settings)
    if settings.held_out.per_class and (settings.layers == "all" or searched_online):
        raise errors.UserError(
            f"config.held_out.per_class={settings.held_out.per_class} needs a frozen network and "
            "one rate (or cached features): set config.layers=classifier, and config.grid.rates=() "
            "or config.augment=none."
        )
    if settings.grid.folds and (searched_online or settings.augment == "flip"):
        raise errors.UserError(
            f"config.grid.folds={settings.grid.folds} validates on cached features: set "
            "--config.augment=none."
        )
    online.check(settings, trained)


def _hold_out(
    settings: ProbeSettings, trained: TrainedModel, source: Source
) -> tuple[TrainedModel, Source, np.ndarray | None]:
    """Makes the images of `config.held_out` the test split.

    Returns:
      The network and the source with this split, and the mask bool[N] of its images in the training
      split; both unchanged and None if no images are held out.
    """
    data = trained.settings.data
    mask = target.held_out(source, data.train_split, settings.held_out)
    if mask is None:
        return trained, source, None
    trained = target.with_eval_split(trained, held_out.SPLIT)
    return trained, held_out.HeldOut(source, data.train_split, mask), mask


def _check_data(
    settings: ProbeSettings, trained: TrainedModel, source: Source, teacher: online.Teacher | None
) -> None:
    data = trained.settings.data
    if _reads_images(settings):
        target.check_labels(source, data.train_split, data.eval_split, data.source != "tfds")
    if teacher is not None and len(teacher.classifier.bias) != source.num_classes:
        raise errors.UserError(
            f"config.distill.teacher={settings.distill.teacher!r} has "
            f"{len(teacher.classifier.bias)} classes, {source.name} has "
            f"{source.num_classes}: give a teacher that was trained on this data set."
        )


def _extract(
    settings: ProbeSettings, trained: TrainedModel, source: Source, split: str
) -> list[Features]:
    """Extracts the features of a split, and of mirrored training images if augment="flip"."""
    both = settings.augment == "flip" and split == trained.settings.data.train_split
    return [
        features.of_split(
            trained,
            source,
            split,
            settings.extract_batch_size,
            (settings.output,),
            settings.blocks,
            mirrored=mirrored,
        )
        for mirrored in ((False, True) if both else (False,))
    ]


def _cached(
    settings: ProbeSettings, trained: TrainedModel, source: Source, mask: np.ndarray | None
) -> tuple[Classifier, dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """Trains on features extracted once, without held-out rows of `mask`; returns as `_online`."""
    train = _extract(settings, trained, source, trained.settings.data.train_split)
    if mask is not None:
        train = [variant.rows(~mask) for variant in train]
    test = _extract(settings, trained, source, trained.settings.data.eval_split)[0]
    target.match(source, train[0].labels, test.labels)
    layer, result = probe.linear_probe(settings, train, test, source.num_classes)
    return layer, result, (layer.scores(getattr(test, settings.output)), test.labels)


def _online(
    settings: ProbeSettings,
    trained: TrainedModel,
    source: Source,
    workdir: str,
    teacher: online.Teacher | None,
) -> tuple[Classifier, dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """Trains on images; returns the classifier, its results, and test scores with labels."""
    data = trained.settings.data
    plan = online.plan(settings, trained, source)
    best = linear.Best(plan.steps_per_epoch)
    folder = epath.Path(workdir) / settings.name

    def test(network: TrainedModel, layer: Classifier) -> tuple[np.ndarray, np.ndarray]:
        extracted = _extract(settings, network, source, data.eval_split)[0]
        return layer.scores(getattr(extracted, settings.output)), extracted.labels

    def evaluate(step: int, network: TrainedModel, layer: Classifier) -> Mapping[str, float]:
        return best(step, *test(network, layer))

    evaluation: dict[str, Any] = dict(
        eval_fn=evaluate, eval_every_steps=settings.evaluate_every_epochs * plan.steps_per_epoch
    )
    network = trained
    search: dict[str, Any] = {}
    if settings.grid.rates:
        layer, search = grid.train_online(settings, trained, source, str(folder), **evaluation)
    else:
        network, layer = online.train(
            settings, trained, source, str(folder), teacher=teacher, **evaluation
        )
    outputs = test(network, layer)
    for line in saved.metrics(str(folder)):
        if "test/top1" in line:
            best.note(line["step"], line["test/top1"])
    return layer, {**scores.summary(*outputs), **search, **best.result}, outputs
