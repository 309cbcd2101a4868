"""Test a run's features with a few labelled images of every class."""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from disco_jax import errors
from disco_jax.data.base import Source
from disco_jax.evaluate import features, ridge, saved, scores, subsets, target
from disco_jax.report import build


def run(config: ConfigDict, workdir: str, source: Source | None = None) -> dict[str, Any]:
    """Evaluates the newest checkpoint of the run in `workdir`; writes NAME.json there.

    Args:
      config: see `configs/fewshot.py`; NAME is its `name`.
      workdir: a pretraining run's directory.
      source: images; None opens the run's own data, or what `config.data` names.

    Returns:
      {"shots": {"5": {"top1": mean over the seeds in percent, "top1_spread": their standard
      deviation, "by_seed"}, ...}, "step", "images"}.

    Raises:
      UserError: a setting, the run or the data will not do; too few images of a class.
    """
    if not config.shots or min(config.shots) < 1 or not config.seeds:
        raise errors.UserError(
            f"config.shots={config.shots} and config.seeds={config.seeds}: give one of each at "
            "least, and 1 image a class or more."
        )
    trained = target.aimed(features.load(workdir, config.network), config.data)
    features.check_outputs(trained, (config.output,), config.blocks)
    trained, source = target.opened(trained, source)
    data = trained.config.data
    train, test = (
        features.of_split(
            trained, source, split, config.batch_size, (config.output,), config.blocks
        )
        for split in (data.train_split, data.eval_split)
    )
    target.match(source, train.labels, test.labels)
    shots = {str(count): _shots(config, train, test, count) for count in config.shots}
    result = {
        "step": trained.step,
        "name": config.name,
        "data": source.name,
        "shots": shots,
        "images": len(test.labels),
    }
    saved.write(workdir, config.name, result)
    if jax.process_index() == 0:
        for count, found in shots.items():
            print(
                f"{count} images a class: top-1 {found['top1']:.2f} +- {found['top1_spread']:.2f} %"
            )
    build.refresh(config.report, workdir)
    return result


def _shots(
    config: ConfigDict, train: features.Features, test: features.Features, count: int
) -> dict[str, Any]:
    rows, tested = getattr(train, config.output), getattr(test, config.output)
    classes, found = int(train.labels.max()) + 1, []
    for seed in config.seeds:
        chosen = subsets.balanced(train.labels, count, seed)
        kernel, bias = ridge.fit(rows[chosen], train.labels[chosen], classes)
        found.append(scores.top_k(tested @ kernel + bias, test.labels, 1))
    return {"top1": float(np.mean(found)), "top1_spread": float(np.std(found)), "by_seed": found}
