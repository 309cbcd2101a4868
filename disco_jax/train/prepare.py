"""Preparation of a run: opens its images and weights, and makes all checks."""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors, fields, methods
from disco_jax.data import pipeline, targets
from disco_jax.data.bags import Bags, BagSource
from disco_jax.data.contract import Source
from disco_jax.data.labelled import LabelledSource
from disco_jax.methods.base import LABEL, Method
from disco_jax.models.encoder import Variables
from disco_jax.nested import flatten
from disco_jax.run import checkpoint
from disco_jax.train import experiment as experiments
from disco_jax.train import monitored, start, step, teacher, teacher_cache
from disco_jax.train.experiment import Experiment
from disco_jax.train.run_settings import RunSettings


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
    def settings(self) -> RunSettings:
        """Settings of the experiment."""
        return self.experiment.settings

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
    settings = experiment.settings
    if "teacher" not in experiment.needs:
        loaded = None
    elif loaded is None:
        encoder = experiment.method.networks["teacher"].encoder
        loaded = teacher.load(settings.teacher, encoder, settings.augment.size)
    ready = Prepared(experiment, source, experiment.build_step(), loaded)
    return _use_cache(ready) if settings.teacher.cache else ready


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
    fields.check(config, problems)
    settings = problems.attempt(experiments.parse, config)
    if settings is None:
        return None
    opened, steps_per_epoch = _open(settings, source, problems)
    problems.attempt(start.check, settings.student, reads=("student",))
    experiment = experiments.check(
        config,
        settings,
        problems,
        devices=jax.device_count(),
        steps_per_epoch=steps_per_epoch,
        has_teacher=loaded is not None,
    )
    if opened is None or experiment is None:
        return None
    bagged = problems.attempt(
        _add_bags, opened, experiment.settings, experiment.method, reads=("data", "bags")
    )
    if bagged is None:
        return None
    labelled = problems.attempt(
        _add_labels, bagged, experiment.settings, experiment.method, reads=("data", "student")
    )
    return None if labelled is None else (labelled, experiment)


def _open(
    settings: RunSettings, source: Source | None, problems: errors.Problems
) -> tuple[Source | None, int]:
    """Opens the images and counts the steps per epoch; None and 0 if it records a mistake."""
    opened = problems.attempt(
        lambda: source or pipeline.open_source(settings.data), reads=("data",)
    )
    if opened is None:
        return None, 0
    problems.attempt(monitored.check, settings, opened, reads=("data", "monitor"))
    lengths = "batch_size", "total_epochs", "optimizer", "learning_rate", "objectives"
    steps = problems.attempt(_check_lengths, settings, opened, reads=("data", *lengths))
    return opened, steps or 0


def _check_lengths(settings: RunSettings, source: Source) -> int:
    """Returns the steps per epoch; raises UserError if a duration does not fit into int32 steps."""
    steps = _steps_per_epoch(source, settings)
    values = sorted(flatten(dataclasses.asdict(settings)).items())
    last = {name: value for name, value in values if name.endswith("_epochs")}
    last["learning_rate.milestones"] = max(settings.learning_rate.milestones, default=0)
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
    if begun or not ready.settings.student.weights:
        return ready
    encoder = ready.method.networks["student"].encoder
    started = start.load(ready.settings.student, ready.settings.augment, encoder)
    return dataclasses.replace(ready, started=started)


def _use_cache(ready: Prepared) -> Prepared:
    """Replaces the teacher's forward passes by the outputs in `config.teacher.cache`."""
    if ready.teacher is None:
        raise errors.UserError("config.teacher.cache is set, but no objective reads a teacher.")
    origin = teacher_cache.origin(ready.experiment, ready.source, ready.teacher)
    outputs = teacher_cache.open_targets(ready.settings.teacher.cache, origin)
    built = ready.experiment.build_step(period=len(outputs))
    source = targets.ReplayedSource(ready.source, outputs)
    return dataclasses.replace(ready, source=source, built=built, period=len(outputs))


def _add_bags(source: Source, settings: RunSettings, method: Method) -> Source:
    """Wraps the source with `config.bags.file` if it is set."""
    members = {view for o in method.objectives.values() for view in o.bag_views}
    if not settings.bags.file:
        return source
    bags = Bags.load(settings.bags.file)
    classifies = any("cluster" in o.aux for o in method.objectives.values())
    if not members and not classifies:
        raise errors.UserError(
            f"config.bags.file={settings.bags.file!r}, but no objective reads bags: leave it "
            "empty, or set the weight of config.objectives.bags or .pseudo_labels."
        )
    if classifies:
        _check_clusters(settings, bags)
    bagged = BagSource(
        source,
        bags,
        sorted(members),
        sampling=settings.bags.sampling,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    bagged.check(settings.data.train_split)
    return bagged


def _add_labels(source: Source, settings: RunSettings, method: Method) -> Source:
    """Wraps the source if an objective reads labels."""
    if not any(LABEL in o.aux for o in method.objectives.values()):
        return source
    labelled = LabelledSource(source, LABEL)
    labelled.check(settings.data.train_split, methods.dim(settings.student))
    return labelled


def _check_clusters(settings: RunSettings, bags: Bags) -> None:
    """Checks that the bags are clusters and that the student has a prototype for each."""
    if bags.clusters is None:
        raise errors.UserError(
            "config.objectives.pseudo_labels needs clusters, but config.bags.file contains "
            "neighbours: create it with `disco-jax bags --config.kind=kmeans`."
        )
    count, classes = int(bags.clusters.max()) + 1, sum(settings.student.prototypes)
    if count > classes:
        raise errors.UserError(
            f"config.student.prototypes={settings.student.prototypes} are fewer than the "
            f"{count} clusters of config.bags.file: set config.student.prototypes=({count},)."
        )


def _steps_per_epoch(source: Source, settings: RunSettings) -> int:
    count = source.count(settings.data.train_split)
    if count < settings.batch_size:
        raise errors.UserError(
            f"config.batch_size={settings.batch_size} is more than the {count} images of "
            f"{source.name}, split {settings.data.train_split!r}."
        )
    return (count // jax.process_count()) // (settings.batch_size // jax.process_count())
