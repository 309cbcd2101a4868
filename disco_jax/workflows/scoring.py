"""Evaluations of finished runs, each with the settings that its run needs."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors, flags, main
from disco_jax.data import pipeline
from disco_jax.data.contract import Source
from disco_jax.evaluate import protocols
from disco_jax.files import read_or_set_aside
from disco_jax.report import paper
from disco_jax.train import stored_settings
from disco_jax.train.run_settings import RunSettings


@dataclasses.dataclass(frozen=True)
class Score:
    """Entry of a list of evaluations, e.g. "linear" or ("semi:percent=1", changes).

    Attributes:
      reference: task and arguments; what they leave open follows from the run.
      changes: ((field, value), ...).
      name: column of a table; equal for all runs, although their protocols may differ.
    """

    reference: str
    changes: tuple[tuple[str, Any], ...]
    name: str

    @property
    def task(self) -> str:
        """Name of the command."""
        return self.reference.partition(":")[0]

    def complete(self, run: RunSettings) -> str:
        """Returns its reference for a run, with the protocol of the run's paper and network."""
        return protocols.complete(self.reference, run)

    def config(self, run: RunSettings) -> ConfigDict:
        """Returns the config of the evaluation for a run with the settings `run`."""
        return flags.changed(flags.load(self.complete(run)), self.changes, "config.evaluate")


def entries(evaluate: Iterable[Any]) -> list[Score]:
    """Returns the evaluations of a list; each is a reference, or (reference, changes).

    Raises:
      UserError: one is unknown, is no evaluation, or changes a field that it does not have.
    """
    tasks = [name for name, task in main.TASKS.items() if task.evaluates]
    scores: list[Score] = []
    for entry in evaluate:
        reference, changes = (entry, ()) if isinstance(entry, str) else entry
        task = reference.partition(":")[0]
        if task not in tasks:
            raise errors.unknown("config.evaluate", task, tasks)
        config = flags.changed(flags.load(reference), changes, "config.evaluate")
        used = {score.name for score in scores}
        name = reference if config.name in used else config.name
        scores.append(Score(reference, tuple(changes), name))
    return scores


def results(run: epath.Path, settings: RunSettings, scores: Sequence[Score]) -> dict[str, Any]:
    """Returns name of the evaluation -> content of its results file, of those that are done.

    Args:
      run: directory of the run.
      settings: its settings.
      scores: the evaluations.
    """
    contents = {score.name: result(run, score.config(settings)) for score in scores}
    return {name: content for name, content in contents.items() if content is not None}


def result(run: epath.Path, config: ConfigDict) -> dict[str, Any] | None:
    """Returns the results of an evaluation with the same settings; None if there are none."""
    content = read_or_set_aside(run / f"{config.name}.json")
    if content is None or "settings" not in content:  # earlier versions did not store them
        return content
    stored, current = (paper.evaluation_fields(c) for c in (content["settings"], config))
    # Of the other fields, 0 and "" follow from the run.
    same = all(stored.get(name) == value for name, value in current.items() if value)
    return content if same else None


def evaluate(
    run: str, task: str, config: ConfigDict, source: Source | None = None
) -> Mapping[str, Any]:
    """Evaluates a run unless it has the results already, and returns them.

    Args:
      run: directory of the run.
      task: name of the command.
      config: config of the evaluation.
      source: images; None opens the data of the run.
    """
    content = result(epath.Path(run), config)
    if content is not None:
        return content
    config = config.copy_and_resolve_references()
    if task == "cost":
        config.runs = (run,)
        return dict(main.module(task).run(config, run))
    source = source or pipeline.open_source(stored_settings.read(run).data)
    return dict(main.module(task).run(config, run, source))
