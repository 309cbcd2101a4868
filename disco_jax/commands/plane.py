"""Trace a run in the information plane while it is fine-tuned (DisCo, figure 7)."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors, files, typed
from disco_jax.data.contract import Source
from disco_jax.evaluate import features, information, linear, online, plots, saved, scores, target
from disco_jax.evaluate.classifier import Classifier
from disco_jax.evaluate.features import TrainedModel
from disco_jax.evaluate.probe_settings import InformationPlaneSettings, PlaneSettings
from disco_jax.report import build

_METRICS = ("input_bits", "label_bits", "top1", "most_bits")
_MINIMA = {"points": 0, "bins": 2, "images": 0}


def run(config: ConfigDict, workdir: str, source: Source | None = None) -> dict[str, Any]:
    """Trains a classifier on the run in `workdir` and records I(X;T) and I(T;Y) of its outputs.

    Writes NAME.json and NAME.png there, and the training to NAME/. NAME is `config.name`.

    Args:
      config: see `configs/plane.py`.
      workdir: a pretraining run's directory.
      source: images; None opens the data of the run, changed by `config.data`.

    Returns:
      {"path": [{"step", "epoch", "input_bits": I(X;T), "label_bits": I(T;Y), "top1", "most_bits":
      the maximum of I(X;T) for this number of images}, ...], "transition": index in the path at
      which I(X;T) begins to fall, "top1", ...}.

    Raises:
      UserError: a setting, the run, the data, or a run in `information_plane.beside` is invalid.
    """
    settings = typed.parse(PlaneSettings, config, defaults=True)
    _check(settings.information_plane)
    plane = settings.information_plane
    beside = {label: _read_path(label, settings.name) for label in plane.beside}
    trained = target.with_eval_data(features.load(workdir, settings.network), settings.data)
    online.check(settings, trained)
    trained, source = target.opened(trained, source)
    data = trained.settings.data
    target.check_labels(source, data.train_split, data.eval_split, data.source != "tfds")
    plan = linear.plan(settings, source.count(data.train_split), jax.process_count())
    path = _trace(settings, trained, source, workdir, plan)
    transition = information.turning_point(np.array([point["input_bits"] for point in path]))
    result = {
        "step": trained.step,
        "name": settings.name,
        "data": source.name,
        "path": path,
        "transition": transition,
        "top1": path[-1]["top1"],
        **saved.settings(config),
    }
    saved.write(workdir, settings.name, result)
    if jax.process_index() == 0:
        file = epath.Path(workdir) / f"{settings.name}.png"
        plots.plane({epath.Path(workdir).name: path, **beside}, file)
        last = path[-1]
        print(
            f"I(X;T) {path[transition]['input_bits']:.2f} -> {last['input_bits']:.2f} bits, I(T;Y) "
            f"{last['label_bits']:.2f} bits, top-1 {last['top1']:.2f} %: {file}"
        )
        if path[transition]["input_bits"] > last["most_bits"] - 1:
            print(
                f"I(X;T) is close to its maximum of {last['most_bits']:.2f} bits for this number "
                "of images: most outputs are alone in their bin. Use more images "
                "(config.information_plane.split, .images)."
            )
    build.refresh(config.report, workdir)
    return result


def _trace(
    settings: PlaneSettings, trained: TrainedModel, source: Source, workdir: str, plan: linear.Plan
) -> list[dict[str, float]]:
    """Trains and returns the points of the path, including those before a restart."""
    data, plane = trained.settings.data, settings.information_plane
    total = settings.total_epochs * plan.steps_per_epoch
    folder = epath.Path(workdir) / settings.name

    def evaluate(step: int, network: TrainedModel, layer: Classifier) -> Mapping[str, float]:
        extracted = features.of_split(
            network,
            source,
            plane.split or data.eval_split,
            settings.extract_batch_size,
            (settings.output,),
            settings.blocks,
            plane.images,
        )
        outputs = layer.scores(getattr(extracted, settings.output))
        rows = information.binned(outputs, plane.bins)
        input_bits, label_bits = information.mutual_information(
            rows, extracted.labels, plane.grouping
        )
        top1 = scores.top_k(outputs, extracted.labels, 1)
        return {
            "plane/input_bits": input_bits,
            "plane/label_bits": label_bits,
            "plane/top1": top1,
            "plane/most_bits": float(np.log2(len(rows))),
        }

    online.train(
        settings,
        trained,
        source,
        str(folder),
        eval_fn=evaluate,
        eval_every_steps=max(total // plane.points, 1) if plane.points else plan.steps_per_epoch,
        eval_first_steps=plan.steps_per_epoch if plane.first_steps else 0,
    )
    points: dict[int, dict[str, float]] = {}
    for line in saved.metrics(str(folder)):
        if "plane/top1" in line:
            metrics = {key: line[f"plane/{key}"] for key in _METRICS}
            step = line["step"]
            points[step] = {"step": step, "epoch": step / plan.steps_per_epoch, **metrics}
    return [points[step] for step in sorted(points)]


def _check(plane: InformationPlaneSettings) -> None:
    if plane.points == 1:
        raise errors.UserError(
            "config.information_plane.points=1 draws no path: give 2 or more, or 0 for each epoch."
        )
    for name, least in _MINIMA.items():
        if (value := getattr(plane, name)) < least:
            raise errors.UserError(f"config.information_plane.{name}={value} is below {least}.")
    if plane.grouping not in information.GROUPINGS:
        raise errors.unknown(
            "config.information_plane.grouping", plane.grouping, information.GROUPINGS
        )


def _read_path(run: str, name: str) -> list[dict[str, float]]:
    file = epath.Path(run) / f"{name}.json"
    if not file.exists():
        raise errors.UserError(
            f"config.information_plane.beside: {file} does not exist. Run `disco-jax plane "
            f"--workdir {run}` first, with the same --config.name."
        )
    return files.read_json(file)["path"]
