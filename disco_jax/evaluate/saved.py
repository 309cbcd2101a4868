"""Trained classifiers on the disk: what a probe or a fine-tuning leaves beside its run."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from disco_jax import errors
from disco_jax.evaluate import features
from disco_jax.evaluate.classifier import Classifier
from disco_jax.evaluate.streamed import Teacher
from disco_jax.files import read_json, whole, write_arrays
from disco_jax.train import checkpoint
from disco_jax.train.metrics import FILE
from disco_jax.train.metrics import read as read_metrics

# What a results' file says of how its classifier reads a network.
READING = ("network", "output", "blocks", "layers")


def write(run: str, name: str, result: Mapping[str, Any], **arrays: np.ndarray) -> None:
    """RUN/NAME.json and, if there are arrays, RUN/NAME.npz; only process 0 writes."""
    if jax.process_index():
        return
    path = epath.Path(run)
    with whole(path / f"{name}.json") as file:
        file.write_text(json.dumps(result, indent=2) + "\n")
    if arrays:
        with whole(path / f"{name}.npz") as place, place.open("wb") as file:
            write_arrays(file, arrays)


def metrics(folder: str) -> list[dict[str, Any]]:
    """Returns the lines of a training's metrics, those before a restart too.

    Lines that are damaged, or not complete yet, are left out.
    """
    return read_metrics(epath.Path(folder) / FILE)[0]


def arrays(layer: Classifier) -> dict[str, np.ndarray]:
    """What `write` keeps of a classifier."""
    return {"kernel": layer.kernel, "bias": layer.bias, **layer.standard}


def read(path: str) -> Teacher:
    """A network and its classifier.

    Args:
      path: RUN/NAME of a linear probe or a fine-tuning, as `config.name` gave it.

    Raises:
      UserError: there is none.
    """
    place = epath.Path(path)
    report, stored = place.with_name(f"{place.name}.json"), place.with_name(f"{place.name}.npz")
    if not (report.exists() and stored.exists()):
        raise errors.UserError(
            f"config.distill.teacher={path!r}: there is no {stored}. Give RUN/NAME, NAME being "
            "the config.name of a linear probe or a fine-tuning of RUN."
        )
    said = read_json(report)
    with stored.open("rb") as file, np.load(file, allow_pickle=False) as loaded:
        kept = {key: loaded[key] for key in loaded.files}
    trained = features.load(str(place.parent), said["network"])
    if said["layers"] == "all":
        trained = _fine_tuned(trained, str(place), kept)
    standard = {key: kept[key] for key in ("mean", "deviation") if key in kept}
    layer = Classifier(kept["kernel"], kept["bias"], standard)
    return Teacher(trained, layer, said["output"], said["blocks"])


def _fine_tuned(
    trained: features.Trained, folder: str, kept: Mapping[str, np.ndarray]
) -> features.Trained:
    head = {"kernel": kept["kernel"], "bias": kept["bias"]}
    like = {"classifier": head, "network": trained.variables["params"]}
    params, _ = checkpoint.load(folder, "params", like)
    stats = trained.variables["batch_stats"]
    if jax.tree.leaves(stats):
        stats, _ = checkpoint.load(folder, "stats", stats)
    variables = {"params": params["network"], "batch_stats": stats}
    return features.Trained(trained.encoder, variables, trained.config, trained.step)
