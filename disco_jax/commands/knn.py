"""Classify held-out images by nearest neighbours in a run's feature space."""

from typing import Any

import jax
from ml_collections import ConfigDict

from disco_jax import errors
from disco_jax.data.contract import Source
from disco_jax.evaluate import features, knn, probe, saved, scores, target
from disco_jax.evaluate.probe_settings import eval_data
from disco_jax.report import build


def run(config: ConfigDict, workdir: str, source: Source | None = None) -> dict[str, Any]:
    """Evaluates the newest checkpoint of the run in `workdir`; writes NAME.json there.

    Args:
      config: see `configs/knn.py`; NAME is its `name`.
      workdir: a pretraining run's directory.
      source: images; None opens the data of the run, changed by `config.data`.

    Returns:
      {"top1", "top5", "top1_interval", "class_top1", "step", ...}, accuracies in percent.
    """
    trained = target.with_eval_data(features.load(workdir, config.network), eval_data(config.data))
    result = {"step": trained.step, **evaluate(config, trained, source), **saved.settings(config)}
    saved.write(workdir, config.name, result)
    if jax.process_index() == 0:
        settings = f"{config.vote}, k = {config.k}, {config.output}"
        print(f"kNN ({settings}): {scores.line(result)}")
    build.refresh(config.report, workdir)
    return result


def evaluate(
    config: ConfigDict, trained: features.TrainedModel, source: Source | None = None
) -> dict[str, Any]:
    """Evaluates a loaded network like `run`, without writing files."""
    features.check_outputs(trained, (config.output,), config.blocks)
    if config.vote not in knn.VOTES:
        raise errors.unknown("config.vote", config.vote, knn.VOTES)
    trained, source = target.opened(trained, source)
    data = trained.settings.data
    train, test = (
        features.of_split(
            trained, source, split, config.batch_size, (config.output,), config.blocks
        )
        for split in (data.train_split, data.eval_split)
    )
    target.match(source, train.labels, test.labels)
    fields = {name: config[name] for name in probe.KNN_FIELDS}
    return {"data": source.name, **probe.knn_probe(train, test, **fields)}
