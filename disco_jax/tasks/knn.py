"""Classify held-out images by their nearest neighbours in a run's feature space."""

import json
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors
from disco_jax.data import pipeline
from disco_jax.data.base import Source
from disco_jax.evaluate import features, knn
from disco_jax.evaluate.scores import top_k

OUTPUTS = ("features", "embedding")


def run(config: ConfigDict, workdir: str, source: Source | None = None) -> dict[str, Any]:
    """Evaluates the newest checkpoint of the run in `workdir`; writes knn.json there.

    Args:
      config: see `configs/knn.py`.
      workdir: a pretraining run's directory.
      source: images; None opens the run's own data.

    Returns:
      {"top1", "top5", "step", ...}, accuracies in percent.
    """
    trained = features.load(workdir, config.network)
    result = {"step": trained.step, **evaluate(config, trained, source)}
    if jax.process_index():
        return result
    (epath.Path(workdir) / "knn.json").write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"kNN ({config.vote}, k = {config.k}, {config.output}): top-1 {result['top1']:.2f} %, "
        f"top-5 {result['top5']:.2f} % of {result['images']} images"
    )
    return result


def evaluate(
    config: ConfigDict, trained: features.Trained, source: Source | None = None
) -> dict[str, Any]:
    """`run` on a network at hand, without writing anything."""
    if config.output not in OUTPUTS:
        raise errors.unknown("config.output", config.output, OUTPUTS)
    source = source or pipeline.open_source(trained.config.data, shared=False)
    data = trained.config.data
    train = features.of_split(trained, source, data.train_split, config.batch_size)
    test = features.of_split(trained, source, data.eval_split, config.batch_size)
    return accuracy(config, train, test)


def accuracy(config: ConfigDict, train: features.Features, test: features.Features):
    """{"top1", "top5", "images"} of extracted features."""
    similarities, rows = knn.neighbours(
        getattr(train, config.output), getattr(test, config.output), config.k
    )
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    votes = knn.scores(
        similarities, train.labels[rows], classes, vote=config.vote, temperature=config.temperature
    )
    accuracies = {f"top{k}": top_k(votes, test.labels, k) for k in (1, 5)}
    return {**accuracies, "images": len(test.labels)}
