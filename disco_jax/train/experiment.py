"""Assembly of a pretraining config: views, method, output shapes, checks, optimizer and step.

All commands, plans, sweeps, caches, benchmarks and tests build a run's parts here.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from disco_jax import errors, methods, models, typed
from disco_jax.data.data_settings import build_views
from disco_jax.data.views import Recipe
from disco_jax.methods.base import Method, Record
from disco_jax.models.encoder import Variables
from disco_jax.models.layers import folding
from disco_jax.ops.memory import Queue
from disco_jax.train import optimizer, state, step, teacher
from disco_jax.train.run_settings import RunSettings

# Fields and groups of the config that `methods.build` reads.
_METHOD = (
    "student", "momentum", "teacher", "objectives", "fast", "augment", "bags", "batch_size",
    "dtype", "group_views", "local", "views",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts that a pretraining config defines, without images and weights.

    Attributes:
      config: the run's config as it is written to config.json, completed from the teacher's
        weights. Nothing but records reads it.
      settings: the same settings, typed.
      views: crops and photometric operations of each view.
      method: networks and objectives; schedules of objectives use `steps_per_epoch`.
      steps_per_epoch: number of full batches per epoch; 0 if the number of images is unknown.
    """

    config: ConfigDict
    settings: RunSettings
    views: Recipe
    method: Method
    steps_per_epoch: int = 0

    @property
    def needs(self) -> Mapping[str, tuple[int, ...]]:
        """Views that each network encodes in a step, for the objectives: network -> views."""
        return self.method.plan

    @property
    def total_steps(self) -> int:
        """Number of steps of the run."""
        return self.settings.total(self.steps_per_epoch)

    def with_epoch_length(self, steps_per_epoch: int) -> "Experiment":
        """Returns the experiment with another number of steps per epoch."""
        method = self.method.with_epoch_length(steps_per_epoch)
        return dataclasses.replace(self, method=method, steps_per_epoch=steps_per_epoch)

    @functools.cached_property
    def record(self) -> Record:
        """Shapes of the networks' outputs for one image, checked against the objectives.

        Raises:
          UserError: an objective compares outputs of different shapes.
        """
        record = state.shapes(self.method, self.views.sizes)
        self.method.check(record)
        return record

    def build_step(self, period: int = 0) -> step.Built:
        """Builds the single-replica step and its learner, with optimizer and schedules.

        Args:
          period: see `step.make_joint_step`.

        Raises:
          UserError: a setting of the optimizer or the schedules is invalid.
        """
        return step.from_settings(
            self.settings, self.method, self.views, self.steps_per_epoch, period
        )

    def initial_state(
        self,
        built: step.Built,
        *,
        teacher: Variables | None = None,
        queue: Queue | None = None,
        started: Variables | None = None,
    ) -> state.TrainState:
        """Creates the state at step 0.

        Args:
          built: the step, whose optimizer state is created.
          teacher: variables of the teacher, from which the student may reuse parts.
          queue: initial queue, saved with the teacher.
          started: initial variables of the student instead of random ones; see `start.load`.
        """
        return state.create(
            self.method,
            built.learner.tx,
            self.settings.seed,
            self.settings.augment.size,
            inherited=queue,
            reused=teacher,
            started=started,
            record=self.record,
        )

    def frozen(self, variables: Variables) -> dict[str, Variables]:
        """Returns the variables that the step reads but never updates.

        Args:
          variables: {"params", "batch_stats"} of the teacher, NumPy arrays or tracers.
        """
        network, size = self.method.networks["teacher"], self.settings.augment.size
        return {"teacher": folding.fold_batch_norm(network, variables, size)}

    def batch_shapes(self, replicas: int) -> dict[str, dict[Any, jax.ShapeDtypeStruct]]:
        """Returns the shapes of a batch with a leading replica axis: {"views", "aux"}."""
        shape = (replicas, self.settings.batch_size // replicas)
        views = {
            view: jax.ShapeDtypeStruct((*shape, side, side, 3), jnp.uint8)
            for view, side in enumerate(self.views.sizes)
        }
        aux = {
            name: jax.ShapeDtypeStruct(shape, jnp.int32)
            for objective in self.method.objectives.values()
            for name in objective.aux
        }
        return {"views": views, "aux": aux}


def parse(config: ConfigDict) -> RunSettings:
    """Converts a pretraining config to typed settings; they may not be resolved.

    Raises:
      UserError: a field is unknown or missing.
    """
    return typed.parse(RunSettings, config)


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns a copy of a pretraining config, completed from the teacher's weights.

    Raises:
      UserError: see `teacher.resolve`.
    """
    return _resolved(config, parse(config))[0]


def resolve_auto(config: ConfigDict, backend: str) -> None:
    """Replaces every "auto" of a pretraining config by its value on a backend, in place.

    Raises:
      UserError: a field has a value that is not allowed.
    """
    for field in models.AUTO:
        group, _, name = field.rpartition(".")
        section = config[group] if group else config
        section[name] = models.resolve_auto(field, section.get(name, "auto"), backend)


def _resolved(config: ConfigDict, settings: RunSettings) -> tuple[ConfigDict, RunSettings]:
    """Returns a copy of the config and the settings, completed from the teacher's weights."""
    student, frozen = teacher.resolve(settings.student, settings.teacher, settings.objectives)
    config = config.copy_and_resolve_references()
    config.student.update(typed.values(student))
    config.teacher.update(typed.values(frozen))
    return config, dataclasses.replace(settings, student=student, teacher=frozen)


def assemble(config: ConfigDict, *, steps_per_epoch: int = 0) -> Experiment:
    """Builds the parts of a pretraining config.

    Args:
      config: see `configs/common.py`; resolved or not.
      steps_per_epoch: number of full batches per epoch; 0 if the number of images is unknown.

    Raises:
      UserError: the views, the method or the teacher's weights are invalid; lists all mistakes.
    """
    problems = errors.Problems()
    experiment = _build(config, parse(config), steps_per_epoch, problems)
    problems.raise_any()
    assert experiment is not None  # otherwise `problems` was not empty
    return experiment


def check(
    config: ConfigDict,
    settings: RunSettings,
    problems: errors.Problems,
    *,
    devices: int,
    steps_per_epoch: int = 0,
    has_teacher: bool = False,
) -> Experiment | None:
    """Builds the parts of a config and makes all checks of a run that need no images.

    Checks that read a field already recorded as wrong are skipped.

    Args:
      config: see `configs/common.py`.
      settings: the output of `parse` for this config.
      problems: receives the mistakes.
      devices: number of devices that share a batch.
      steps_per_epoch: number of full batches per epoch; 0 if the number of images is unknown.
      has_teacher: the teacher is loaded already, so that its path is not checked.

    Returns:
      The experiment; None if `problems` received a mistake that prevents its assembly.
    """
    grouped = "student.norm_group", "teacher.norm_group", "objectives.relations"
    problems.attempt(check_devices, settings, devices, reads=("batch_size", *grouped))
    rates = "learning_rate", "optimizer", "momentum", "batch_size", "total_epochs"
    problems.attempt(_check_rates, settings, reads=rates)
    experiment = _build(config, settings, steps_per_epoch, problems)
    if experiment is None:
        return None
    problems.attempt(check_views, experiment)
    problems.attempt(_check_best_metric, experiment, reads=("checkpoint",))
    problems.attempt(_check_patterns, experiment, reads=("optimizer",))
    if "teacher" in experiment.needs and not has_teacher:
        problems.attempt(teacher.check_weights, experiment.settings.teacher)
    record = problems.attempt(lambda: experiment.record)
    return None if record is None else experiment


def _build(
    config: ConfigDict, settings: RunSettings, steps_per_epoch: int, problems: errors.Problems
) -> Experiment | None:
    """Builds views, then method; returns None if it records a mistake that prevents this."""
    views = problems.attempt(
        build_views,
        *(settings.augment, settings.views, settings.local),
        reads=("augment", "views", "local"),
    )
    objectives = "objectives", "views", "local", "batch_size", "student", "group_views", "bags"
    problems.attempt(methods.check, settings.method, reads=objectives)
    resolved = problems.attempt(
        _resolved, config, settings, reads=("teacher", "student", "objectives")
    )
    if views is None or resolved is None:
        return None
    config, settings = resolved
    method = problems.attempt(methods.build, settings.method, reads=_METHOD)
    if method is None:
        return None
    experiment = Experiment(config, settings, views, method)
    return experiment.with_epoch_length(steps_per_epoch) if steps_per_epoch else experiment


def check_views(experiment: Experiment) -> None:
    """Checks that every view is read by an objective.

    Raises:
      UserError: a view is unused.
    """
    read = {view for views in experiment.needs.values() for view in views}
    unused = sorted(set(range(len(experiment.views.crops))) - read)
    if unused:
        raise errors.UserError(
            f"The recipe makes view {unused[0]}, which no objective reads: lower config.views or "
            "config.local.count, or let an objective read it (config.objectives.*.views, .pairs)."
        )


def check_devices(settings: RunSettings, devices: int) -> None:
    """Checks that the batch can be divided among devices, and per device into groups.

    Raises:
      UserError: config.batch_size, a norm_group or config.objectives.relations.group is not a
        divisor; the message names valid values.
    """
    batch = settings.batch_size
    if batch % devices:
        nearest = [n for n in (batch // devices * devices, (batch // devices + 1) * devices) if n]
        raise errors.UserError(
            f"config.batch_size={batch} is not a multiple of the {devices} devices; the nearest "
            f"that are: {', '.join(map(str, nearest))}."
        )
    for network, spec in (("student", settings.student), ("teacher", settings.teacher)):
        group = spec.norm_group
        if group and spec.norm == "sync":
            _check_sync_group(network, group, batch, devices)
        elif group and (batch // devices) % group:
            fits = [g for g in range(1, batch // devices + 1) if (batch // devices) % g == 0]
            raise errors.UserError(
                f"config.{network}.norm_group={group} does not divide the {batch // devices} "
                f"images per device; valid: {', '.join(map(str, fits))}, or 0 for all of them."
            )
    relations = settings.objectives["relations"]
    group = relations["group"]
    if relations["weight"] and group and (batch // devices) % group:
        raise errors.UserError(
            f"config.objectives.relations.group={group} does not divide the {batch // devices} "
            "images per device; set a divisor, or 0 for all of them."
        )


def _check_sync_group(network: str, group: int, batch: int, devices: int) -> None:
    """Checks that groups of images over several devices consist of whole devices, or divide them.

    Raises:
      UserError: see `check_devices`.
    """

    def fits(size: int) -> bool:
        count = batch // size
        return batch % size == 0 and (count % devices == 0 or devices % count == 0)

    if not fits(group):
        sizes = ", ".join(str(size) for size in range(1, batch + 1) if fits(size))
        raise errors.UserError(
            f"config.{network}.norm_group={group} with config.{network}.norm='sync' does not fit "
            f"{batch} images on {devices} devices; valid: {sizes}, or 0 for all of them."
        )


def _check_rates(settings: RunSettings) -> None:
    """Checks the optimizer and the schedules, independently of the number of steps."""
    epochs = settings.total_epochs
    rate = optimizer.learning_rate(settings.learning_rate, settings.batch_size, 1, epochs)
    optimizer.build(settings.optimizer, rate, 1, epochs)


def _check_best_metric(experiment: Experiment) -> None:
    """Checks that the metric of the best checkpoint is a loss of the method."""
    losses = ["loss", *(f"{name}/loss" for name in experiment.method.objectives)]
    metric = experiment.settings.checkpoint.best_metric
    if metric not in ("", *losses):
        raise errors.unknown("config.checkpoint.best_metric", metric, losses)


def _check_patterns(experiment: Experiment) -> None:
    """Checks that the optimizer's patterns match parameters of the student."""
    settings = experiment.settings
    if any(settings.optimizer.patterns.values()):
        encoder = experiment.method.networks["student"].encoder
        params = jax.eval_shape(lambda: encoder.create(0, settings.augment.size))["params"]
        optimizer.check_patterns(settings.optimizer, params)
