"""Train a linear classifier on a run's frozen features and test it on held-out images."""

import json
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from disco_jax.data import pipeline
from disco_jax.data.base import Source
from disco_jax.evaluate import features, linear
from disco_jax.files import whole


def run(config: ConfigDict, workdir: str, source: Source | None = None) -> dict[str, Any]:
    """Probes the newest checkpoint of the run in `workdir`.

    Writes linear.json and linear.npz (kernel, bias) there.

    Args:
      config: see `configs/linear.py`.
      workdir: a pretraining run's directory.
      source: images; None opens the run's own data.

    Returns:
      {"top1", "top5", "step", ...}, accuracies in percent.
    """
    trained = features.load(workdir, config.network)
    source = source or pipeline.open_source(trained.config.data, shared=False)
    data = trained.config.data
    train = features.of_split(trained, source, data.train_split, config.extract_batch_size)
    test = features.of_split(trained, source, data.eval_split, config.extract_batch_size)
    params, result = probe(config, train, test)
    result = {"step": trained.step, **result}
    if jax.process_index():
        return result
    path = epath.Path(workdir)
    with whole(path / "linear.npz") as kept, kept.open("wb") as file:
        np.savez(file, **params)
    with whole(path / "linear.json") as file:
        file.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"Linear probe: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} % of "
        f"{result['images']} images"
    )
    return result


def probe(config: ConfigDict, train: features.Features, test: features.Features):
    """The trained layer and {"top1", "top5", "train_top1", "images"}."""
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    params = linear.train(config, train, classes)
    accuracies = linear.accuracy(params, test)
    train_top1 = linear.accuracy(params, train)["top1"]
    return params, {**accuracies, "train_top1": train_top1, "images": len(test.labels)}
