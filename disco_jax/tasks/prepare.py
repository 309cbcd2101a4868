"""Checks of a pretraining run, and assembly of its parts, before any file is written."""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors, fields, methods
from disco_jax.data import pipeline, targets, views
from disco_jax.data.bags import Bags, BagSource
from disco_jax.data.base import Source
from disco_jax.evaluate import monitor
from disco_jax.methods.base import Method, Record
from disco_jax.models.encoder import Variables
from disco_jax.models.layers import folding
from disco_jax.nested import flatten
from disco_jax.run import checkpoint
from disco_jax.tasks import cached
from disco_jax.train import optimizer, start, state, step, teacher


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The checked parts of a run, before any file is written and any step is compiled.

    Attributes:
      config: pretraining config, completed from the teacher's weights.
      recipe: crops and photometric operations.
      method: networks and objectives.
      source: images.
      steps_per_epoch: number of full batches per epoch.
      total: number of steps of the run.
      built: the training step and its learner.
      teacher: frozen weights; None if the method has no teacher.
      record: shapes of the networks' outputs for a batch of one image.
      started: initial variables of the student instead of random ones; see `start.load`.
      period: number of steps after which the views and the cached teacher outputs repeat
        (`config.teacher.cache`); 0 if the teacher is evaluated in every step.
    """

    config: ConfigDict
    recipe: views.Recipe
    method: Method
    source: Source
    steps_per_epoch: int
    total: int
    built: step.Built
    teacher: teacher.Teacher | None
    record: Record
    started: Variables | None = None
    period: int = 0

    @property
    def frozen(self) -> dict[str, Any]:
        """Variables that the step reads but never updates."""
        if self.teacher is None or self.period:
            return {}
        variables = self.teacher.variables
        network, size = self.method.networks["teacher"], self.config.augment.size
        arrays = jax.tree.map(np.asarray, variables)
        return {"teacher": folding.fold_batch_norm(network, arrays, size)}


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The parts of a run that do not depend on the images, checked; see `Prepared`."""

    config: ConfigDict
    recipe: views.Recipe
    method: Method
    record: Record


# Fields and groups of the config that `methods.build` reads.
_METHOD = (
    "student", "momentum", "teacher", "objectives", "fast", "augment", "bags", "batch_size",
    "dtype", "group_views", "local", "views",
)  # fmt: skip


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
    source, parts = checked
    config, method = parts.config, parts.method
    steps_per_epoch = _steps_per_epoch(source, config)
    method = method.paced(steps_per_epoch)
    if "teacher" not in method.plan:
        loaded = None
    elif loaded is None:
        encoder = method.networks["teacher"].encoder
        loaded = teacher.load(config.teacher, encoder, config.augment.size)
    ready = Prepared(
        config=config,
        recipe=parts.recipe,
        method=method,
        source=source,
        steps_per_epoch=steps_per_epoch,
        total=config.total_steps or config.total_epochs * steps_per_epoch,
        built=step.from_config(config, method, parts.recipe, steps_per_epoch),
        teacher=loaded,
        record=parts.record,
    )
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
) -> tuple[Source, _Parts] | None:
    """Returns the images and the other parts; None if `problems` received a mistake."""
    opened, parts = _open(config, source, problems), _build(config, loaded, problems)
    if opened is None or parts is None:
        return None
    bagged = problems.attempt(_add_bags, opened, parts.config, parts.method, reads=("data", "bags"))
    return None if bagged is None else (bagged, parts)


def _open(config: ConfigDict, source: Source | None, problems: errors.Problems) -> Source | None:
    """Opens the images; records mistakes in single fields, and those that depend on the images."""
    fields.check(config, problems)
    opened = problems.attempt(lambda: source or pipeline.open_source(config.data), reads=("data",))
    if opened is not None:
        problems.attempt(monitor.check, config, opened, reads=("data", "monitor"))
        lengths = "batch_size", "total_epochs", "optimizer", "learning_rate", "objectives"
        problems.attempt(_check_lengths, config, opened, reads=("data", *lengths))
    return opened


def _build(
    config: ConfigDict, loaded: teacher.Teacher | None, problems: errors.Problems
) -> _Parts | None:
    """Builds what does not depend on the images; returns None if it records a mistake in it."""
    devices = jax.device_count()
    grouped = "student.norm_group", "teacher.norm_group", "objectives.relations"
    problems.attempt(check_devices, config, devices, reads=("batch_size", *grouped))
    rates = "learning_rate", "optimizer", "momentum", "batch_size", "total_epochs"
    problems.attempt(_check_rates, config, reads=rates)
    problems.attempt(start.check, config.student, reads=("student",))
    recipe = problems.attempt(
        views.build, config.augment, config.views, config.local, reads=("augment", "views", "local")
    )
    objectives = "objectives", "views", "local", "batch_size", "student", "group_views", "bags"
    problems.attempt(methods.check, config, reads=objectives)
    resolved = problems.attempt(teacher.resolve, config, reads=("teacher", "student", "objectives"))
    if recipe is None or resolved is None:
        return None
    method = problems.attempt(
        methods.build, resolved, resolved.views, resolved.local.count, reads=_METHOD
    )
    if method is None:
        return None
    problems.attempt(check_views, recipe, method)
    problems.attempt(_check_best_metric, config, method, reads=("checkpoint",))
    problems.attempt(_check_patterns, resolved, method, reads=("optimizer",))
    if "teacher" in method.plan and loaded is None:
        problems.attempt(teacher.check_weights, resolved.teacher)
    record = problems.attempt(_shapes, method, recipe)
    return None if record is None else _Parts(resolved, recipe, method, record)


def _shapes(method: Method, recipe: views.Recipe) -> Record:
    """Returns the shapes of the networks' outputs, checked against the objectives."""
    record = state.shapes(method, recipe.sizes)
    method.check(record)
    return record


def _check_rates(config: ConfigDict) -> None:
    """Checks the optimizer and the schedules, independently of the number of steps."""
    epochs = config.total_epochs
    rate = optimizer.learning_rate(config.learning_rate, config.batch_size, 1, epochs)
    optimizer.build(config.optimizer, rate, 1, epochs)


def _check_best_metric(config: ConfigDict, method: Method) -> None:
    losses = ["loss", *(f"{name}/loss" for name in method.objectives)]
    if config.checkpoint.best_metric not in ("", *losses):
        raise errors.unknown("config.checkpoint.best_metric", config.checkpoint.best_metric, losses)


def _check_lengths(config: ConfigDict, source: Source) -> None:
    """Checks that the images fill a batch and that all durations fit into int32 steps."""
    steps = _steps_per_epoch(source, config)
    last = {name: value for name, value in flatten(config).items() if name.endswith("_epochs")}
    last["learning_rate.milestones"] = max(config.learning_rate.milestones, default=0)
    late = [f"config.{name}={value}" for name, value in last.items() if value * steps > fields.MOST]
    if late:
        raise errors.UserError(
            f"{', '.join(late)}: at {steps} steps per epoch the limit is {fields.MOST // steps} "
            "epochs."
        )


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
    origin = cached.origin(config, ready.method, ready.record, ready.source, ready.teacher)
    outputs = cached.open_targets(config.teacher.cache, origin)
    built = step.from_config(
        config, ready.method, ready.recipe, ready.steps_per_epoch, period=len(outputs)
    )
    source = targets.ReplayedSource(ready.source, outputs)
    return dataclasses.replace(ready, source=source, built=built, period=len(outputs))


def _add_bags(source: Source, config: ConfigDict, method: Method) -> Source:
    """Wraps the source with `config.bags.file` if it is set."""
    members = {view for o in method.objectives.values() for view in o.members}
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


def check_views(recipe: views.Recipe, method: Method) -> None:
    """Checks that every view is read by an objective."""
    read = {view for views in method.plan.values() for view in views}
    unused = sorted(set(range(len(recipe.crops))) - read)
    if unused:
        raise errors.UserError(
            f"The recipe makes view {unused[0]}, which no objective reads: lower config.views or "
            "config.local.count, or let an objective read it (config.objectives.*.views, .pairs)."
        )


def _check_patterns(config: ConfigDict, method: Method) -> None:
    """Checks that the optimizer's patterns match parameters of the student."""
    if any(config.optimizer[field] for field in ("frozen", "frozen_until", "unit_norm")):
        encoder = method.networks["student"].encoder
        params = jax.eval_shape(lambda: encoder.create(0, config.augment.size))["params"]
        optimizer.check_patterns(config.optimizer, params)


def check_devices(config: ConfigDict, devices: int) -> None:
    """Checks that the batch can be divided among devices, and per device into groups.

    Raises:
      UserError: config.batch_size, a norm_group or config.objectives.relations.group is not a
        divisor; the message names valid values.
    """
    batch = config.batch_size
    if batch % devices:
        nearest = [n for n in (batch // devices * devices, (batch // devices + 1) * devices) if n]
        raise errors.UserError(
            f"config.batch_size={batch} is not a multiple of the {devices} devices; the nearest "
            f"that are: {', '.join(map(str, nearest))}."
        )
    for network in ("student", "teacher"):
        group = config[network].norm_group
        if group and (batch // devices) % group:
            fits = [g for g in range(1, batch // devices + 1) if (batch // devices) % g == 0]
            raise errors.UserError(
                f"config.{network}.norm_group={group} does not divide the {batch // devices} "
                f"images per device; valid: {', '.join(map(str, fits))}, or 0 for all of them."
            )
    group = config.objectives.relations.group
    if config.objectives.relations.weight and group and (batch // devices) % group:
        raise errors.UserError(
            f"config.objectives.relations.group={group} does not divide the {batch // devices} "
            "images per device; set a divisor, or 0 for all of them."
        )


def _steps_per_epoch(source: Source, config: ConfigDict) -> int:
    count = source.count(config.data.train_split)
    if count < config.batch_size:
        raise errors.UserError(
            f"config.batch_size={config.batch_size} is more than the {count} images of "
            f"{source.name}, split {config.data.train_split!r}."
        )
    return (count // jax.process_count()) // (config.batch_size // jax.process_count())
