"""Files of trained classifiers, written by linear probes and fine-tunings to their run."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from disco_jax import errors
from disco_jax.evaluate import features
from disco_jax.evaluate.classifier import Classifier
from disco_jax.evaluate.online import Teacher
from disco_jax.files import read_json, whole, write_arrays
from disco_jax.run import checkpoint
from disco_jax.run.metrics import FILE
from disco_jax.run.metrics import read as read_metrics

# Fields of a results file that define how its classifier reads a network.
READING = ("network", "output", "blocks", "layers")


def write(run: str, name: str, result: Mapping[str, Any], **arrays: np.ndarray) -> None:
    """Writes RUN/NAME.json and, if there are arrays, RUN/NAME.npz; only process 0 writes."""
    if jax.process_index():
        return
    path = epath.Path(run)
    with whole(path / f"{name}.json") as file:
        file.write_text(json.dumps(result, indent=2) + "\n")
    if arrays:
        with whole(path / f"{name}.npz") as unfinished, unfinished.open("wb") as file:
            write_arrays(file, arrays)


def settings(evaluation: Any) -> dict[str, Any]:
    """Returns the settings of an evaluation for its results file, as values of JSON.

    Args:
      evaluation: a ConfigDict.
    """
    return {"settings": json.loads(evaluation.to_json_best_effort())}


def metrics(folder: str) -> list[dict[str, Any]]:
    """Returns the lines of a training's metrics, including those before a restart.

    Damaged and incomplete lines are skipped.
    """
    return read_metrics(epath.Path(folder) / FILE)[0]


def arrays(layer: Classifier) -> dict[str, np.ndarray]:
    """Returns the arrays of a classifier, as `write` stores them."""
    return {"kernel": layer.kernel, "bias": layer.bias, **layer.feature_stats}


def read(path: str) -> Teacher:
    """Loads a network and its classifier.

    Args:
      path: RUN/NAME of a linear probe or a fine-tuning; NAME is its `config.name`.

    Raises:
      UserError: if the files do not exist.
    """
    base = epath.Path(path)
    report_file, arrays_file = (
        base.with_name(f"{base.name}.json"),
        base.with_name(f"{base.name}.npz"),
    )
    if not (report_file.exists() and arrays_file.exists()):
        raise errors.UserError(
            f"config.distill.teacher={path!r}: there is no {arrays_file}. Set it to RUN/NAME; NAME "
            "is the config.name of a linear probe or a fine-tuning of RUN."
        )
    result = read_json(report_file)
    with arrays_file.open("rb") as file, np.load(file, allow_pickle=False) as loaded:
        stored_arrays = {key: loaded[key] for key in loaded.files}
    trained = features.load(str(base.parent), result["network"])
    if result["layers"] == "all":
        trained = _fine_tuned(trained, str(base), stored_arrays)
    feature_stats = {
        key: stored_arrays[key] for key in ("mean", "deviation") if key in stored_arrays
    }
    layer = Classifier(stored_arrays["kernel"], stored_arrays["bias"], feature_stats)
    return Teacher(trained, layer, result["output"], result["blocks"])


def _fine_tuned(
    trained: features.TrainedModel, folder: str, arrays: Mapping[str, np.ndarray]
) -> features.TrainedModel:
    head = {"kernel": arrays["kernel"], "bias": arrays["bias"]}
    like = {"classifier": head, "network": trained.variables["params"]}
    params, _ = checkpoint.load(folder, "params", like)
    stats = trained.variables["batch_stats"]
    if jax.tree.leaves(stats):
        stats, _ = checkpoint.load(folder, "stats", stats)
    variables = {"params": params["network"], "batch_stats": stats}
    return features.TrainedModel(trained.encoder, variables, trained.settings, trained.step)
