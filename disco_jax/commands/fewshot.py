"""Evaluate a run's features with a few labelled images per class."""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from disco_jax import errors
from disco_jax.data.contract import Source
from disco_jax.data.subset import SubsetSource, read_labels
from disco_jax.evaluate import features, ridge, saved, scores, subsets, target
from disco_jax.evaluate.probe_settings import eval_data
from disco_jax.report import build


def run(config: ConfigDict, workdir: str, source: Source | None = None) -> dict[str, Any]:
    """Evaluates the newest checkpoint of the run in `workdir`; writes NAME.json there.

    Args:
      config: see `configs/fewshot.py`; NAME is its `name`.
      workdir: a pretraining run's directory.
      source: images; None opens the data of the run, changed by `config.data`.

    Returns:
      {"shots": {"5": {"top1": mean over the seeds in percent, "top1_spread": their standard
      deviation, "by_seed"}, ...}, "step", "images"}.

    Raises:
      UserError: a setting, the run or the data is invalid, or a class has too few images.
    """
    _check(config)
    trained = target.with_eval_data(features.load(workdir, config.network), eval_data(config.data))
    features.check_outputs(trained, (config.output,), config.blocks)
    trained, source = target.opened(trained, source)
    data = trained.settings.data
    labels = read_labels(source, data.train_split)
    if (labels < 0).any():
        raise features.unlabelled(source, data.train_split)
    drawn = {
        count: [subsets.balanced(labels, count, seed) for seed in config.seeds]
        for count in config.shots
    }
    rows = np.unique(np.concatenate([row for seeds in drawn.values() for row in seeds]))
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    few = SubsetSource(source, data.train_split, rows, **hosts)
    train = _extract(config, trained, few, data.train_split)
    test = _extract(config, trained, source, data.eval_split)
    if len(train.labels) != len(rows):
        raise errors.UserError(
            f"{len(rows) - len(train.labels)} of the sampled images cannot be read. Remove them "
            "from the data set (`disco-jax data` lists them), or change config.seeds."
        )
    target.match(source, train.labels, test.labels)
    shots = {
        str(count): _shots(config, train, test, [np.searchsorted(rows, r) for r in seeds])
        for count, seeds in drawn.items()
    }
    result = {
        "step": trained.step,
        "name": config.name,
        "data": source.name,
        "shots": shots,
        "images": len(test.labels),
        **saved.settings(config),
    }
    saved.write(workdir, config.name, result)
    if jax.process_index() == 0:
        for count, row in shots.items():
            print(
                f"{count} images per class: top-1 {row['top1']:.2f} +- {row['top1_spread']:.2f} %"
            )
    build.refresh(config.report, workdir)
    return result


def _check(config: ConfigDict) -> None:
    if not config.shots or min(config.shots) < 1 or not config.seeds:
        raise errors.UserError(
            f"config.shots={config.shots} and config.seeds={config.seeds}: give at least one of "
            "each, and shots of 1 or more."
        )


def _extract(
    config: ConfigDict, trained: features.TrainedModel, source: Source, split: str
) -> features.Features:
    return features.of_split(
        trained, source, split, config.batch_size, (config.output,), config.blocks
    )


def _shots(
    config: ConfigDict,
    train: features.Features,
    test: features.Features,
    drawn: list[np.ndarray],
) -> dict[str, Any]:
    """Returns mean, standard deviation and list of the top-1 over samples of training rows."""
    rows, tested = getattr(train, config.output), getattr(test, config.output)
    classes, top1 = int(train.labels.max()) + 1, []
    for sample in drawn:
        kernel, bias = ridge.fit(rows[sample], train.labels[sample], classes)
        top1.append(scores.top_k(tested @ kernel + bias, test.labels, 1))
    return {"top1": float(np.mean(top1)), "top1_spread": float(np.std(top1)), "by_seed": top1}
