"""Preparation of a run: opens its images and weights, and makes all checks."""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors, fields
from disco_jax.data import pipeline, targets
from disco_jax.data.bags import Bags, BagSource
from disco_jax.data.contract import Source
from disco_jax.methods.base import Method
from disco_jax.models.encoder import Variables
from disco_jax.nested import flatten
from disco_jax.run import checkpoint
from disco_jax.train import experiment as experiments
from disco_jax.train import monitored, start, step, teacher, teacher_cache
from disco_jax.train.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The checked parts of a run, before any file is written and any step is compiled.

    Attributes:
      experiment: views, method and config.
      source: images.
      built: the training step and its learner.
      teacher: frozen weights; None if the method has no teacher.
      started: initial variables of the student instead of random ones; see `start.load`.
      period: number of steps after which the views and the cached teacher outputs repeat
        (`config.teacher.cache`); 0 if the teacher is evaluated in every step.
    """

    experiment: Experiment
    source: Source
    built: step.Built
    teacher: teacher.Teacher | None
    started: Variables | None = None
    period: int = 0

    @property
    def config(self) -> ConfigDict:
        """Config of the experiment."""
        return self.experiment.config

    @property
    def method(self) -> Method:
        """Method of the experiment."""
        return self.experiment.method

    @property
    def frozen(self) -> dict[str, Any]:
        """Variables that the step reads but never updates."""
        if self.teacher is None or self.period:
            return {}
        return self.experiment.frozen(jax.tree.map(np.asarray, self.teacher.variables))


def prepare(
    config: ConfigDict, source: Source | None = None, loaded: teacher.Teacher | None = None
) -> Prepared:
    """Checks a config, opens its data and loads its teacher.

    Args:
      config: config of a pretraining run.
      source: images; None opens `config.data`.
      loaded: the teacher of `config.teacher`, if it has been loaded already.

    Raises:
      UserError: settings, the data or the teacher are invalid; the message lists all mistakes.
    """
    problems = errors.Problems()
    checked = _check_all(config, source, loaded, problems)
    problems.raise_any()
    assert checked is not None  # otherwise `problems` was not empty
    source, experiment = checked
    config = experiment.config
    if "teacher" not in experiment.needs:
        loaded = None
    elif loaded is None:
        encoder = experiment.method.networks["teacher"].encoder
        loaded = teacher.load(config.teacher, encoder, config.augment.size)
    ready = Prepared(experiment, source, experiment.build_step(), loaded)
    return _use_cache(ready) if config.teacher.cache else ready


def check(config: ConfigDict, problems: errors.Problems) -> None:
    """Records all mistakes in a pretraining config, its data and its teacher in `problems`.

    Checks that read a field already recorded as wrong are skipped.
    """
    _check_all(config, None, None, problems)


def _check_all(
    config: ConfigDict,
    source: Source | None,
    loaded: teacher.Teacher | None,
    problems: errors.Problems,
) -> tuple[Source, Experiment] | None:
    """Returns the images and the experiment; None if `problems` received a mistake."""
    opened, steps_per_epoch = _open(config, source, problems)
    problems.attempt(start.check, config.student, reads=("student",))
    experiment = experiments.check(
        config,
        problems,
        devices=jax.device_count(),
        steps_per_epoch=steps_per_epoch,
        has_teacher=loaded is not None,
    )
    if opened is None or experiment is None:
        return None
    bagged = problems.attempt(
        _add_bags, opened, experiment.config, experiment.method, reads=("data", "bags")
    )
    return None if bagged is None else (bagged, experiment)


def _open(
    config: ConfigDict, source: Source | None, problems: errors.Problems
) -> tuple[Source | None, int]:
    """Opens the images and counts the steps per epoch; None and 0 if it records a mistake.

    Records mistakes in single fields, and those that depend on the images.
    """
    fields.check(config, problems)
    opened = problems.attempt(lambda: source or pipeline.open_source(config.data), reads=("data",))
    if opened is None:
        return None, 0
    problems.attempt(monitored.check, config, opened, reads=("data", "monitor"))
    lengths = "batch_size", "total_epochs", "optimizer", "learning_rate", "objectives"
    steps = problems.attempt(_check_lengths, config, opened, reads=("data", *lengths))
    return opened, steps or 0


def _check_lengths(config: ConfigDict, source: Source) -> int:
    """Returns the steps per epoch; raises UserError if a duration does not fit into int32 steps."""
    steps = _steps_per_epoch(source, config)
    last = {name: value for name, value in flatten(config).items() if name.endswith("_epochs")}
    last["learning_rate.milestones"] = max(config.learning_rate.milestones, default=0)
    late = [f"config.{name}={value}" for name, value in last.items() if value * steps > fields.MOST]
    if late:
        raise errors.UserError(
            f"{', '.join(late)}: at {steps} steps per epoch the limit is {fields.MOST // steps} "
            "epochs."
        )
    return steps


def starting(ready: Prepared, workdir: str) -> Prepared:
    """Loads `config.student.weights` if the run has no checkpoint yet.

    A resumed run ignores them, since its checkpoints contain the student.

    Args:
      ready: the run.
      workdir: the run's directory, which need not exist.

    Raises:
      UserError: the weights cannot be read, or belong to another network.
    """
    folder = epath.Path(workdir) / checkpoint.FOLDER
    begun = folder.exists() and any(entry.name.isdigit() for entry in folder.iterdir())
    if begun or not ready.config.student.get("weights", ""):
        return ready
    started = start.load(ready.config, ready.method.networks["student"].encoder)
    return dataclasses.replace(ready, started=started)


def _use_cache(ready: Prepared) -> Prepared:
    """Replaces the teacher's forward passes by the outputs in `config.teacher.cache`."""
    config = ready.config
    if ready.teacher is None:
        raise errors.UserError("config.teacher.cache is set, but no objective reads a teacher.")
    origin = teacher_cache.origin(ready.experiment, ready.source, ready.teacher)
    outputs = teacher_cache.open_targets(config.teacher.cache, origin)
    built = ready.experiment.build_step(period=len(outputs))
    source = targets.ReplayedSource(ready.source, outputs)
    return dataclasses.replace(ready, source=source, built=built, period=len(outputs))


def _add_bags(source: Source, config: ConfigDict, method: Method) -> Source:
    """Wraps the source with `config.bags.file` if it is set."""
    members = {view for o in method.objectives.values() for view in o.bag_views}
    if not config.bags.file:
        return source
    bags = Bags.load(config.bags.file)
    classifies = any("cluster" in o.aux for o in method.objectives.values())
    if not members and not classifies:
        raise errors.UserError(
            f"config.bags.file={config.bags.file!r}, but no objective reads bags: leave it empty, "
            "or set the weight of config.objectives.bags or .pseudo_labels."
        )
    if classifies:
        _check_clusters(config, bags)
    bagged = BagSource(
        source,
        bags,
        sorted(members),
        sampling=config.bags.sampling,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    bagged.check(config.data.train_split)
    return bagged


def _check_clusters(config: ConfigDict, bags: Bags) -> None:
    """Checks that the bags are clusters and that the student has a prototype for each."""
    if bags.clusters is None:
        raise errors.UserError(
            "config.objectives.pseudo_labels needs clusters, but config.bags.file contains "
            "neighbours: create it with `disco-jax bags --config.kind=kmeans`."
        )
    count, classes = int(bags.clusters.max()) + 1, sum(config.student.prototypes)
    if count > classes:
        raise errors.UserError(
            f"config.student.prototypes={tuple(config.student.prototypes)} are fewer than the "
            f"{count} clusters of config.bags.file: set config.student.prototypes=({count},)."
        )


def _steps_per_epoch(source: Source, config: ConfigDict) -> int:
    count = source.count(config.data.train_split)
    if count < config.batch_size:
        raise errors.UserError(
            f"config.batch_size={config.batch_size} is more than the {count} images of "
            f"{source.name}, split {config.data.train_split!r}."
        )
    return (count // jax.process_count()) // (config.batch_size // jax.process_count())
