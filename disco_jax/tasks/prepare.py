"""What a run needs, checked, before anything is written or compiled."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from disco_jax import errors, methods
from disco_jax.data import pipeline, targets, views
from disco_jax.data.bags import Bags, BagSource
from disco_jax.data.base import Source
from disco_jax.evaluate import monitor
from disco_jax.methods.base import Method, Record
from disco_jax.models import fold
from disco_jax.tasks import cached
from disco_jax.train import optimizer, state, step, teacher


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that a run needs, checked, before anything is written or compiled.

    Attributes:
      config: with what the teacher's weights decide filled in.
      recipe: crops and photometric operations.
      method: networks and objectives.
      source: images.
      steps_per_epoch: whole batches an epoch.
      total: the step to stop after.
      built: the step.
      teacher: frozen weights; None if the method has no teacher.
      record: of shapes: what the networks make of an image.
      period: steps after which the views come again, with the teacher's outputs beside them
        (`config.teacher.cache`); 0: the teacher is asked in every step.
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
    period: int = 0

    @property
    def frozen(self) -> dict[str, Any]:
        """What the step reads and never changes."""
        if self.teacher is None or self.period:
            return {}
        variables = self.teacher.variables
        if not self.config.fast.teacher:
            return {"teacher": variables}
        network, size = self.method.networks["teacher"], self.config.augment.size
        return {"teacher": fold.still(network, jax.tree.map(np.asarray, variables), size)}


def prepare(
    config: ConfigDict, source: Source | None = None, loaded: teacher.Teacher | None = None
) -> Prepared:
    """Checks a config and opens what it names.

    Args:
      config: of a pretraining run.
      source: images; None opens `config.data`.
      loaded: the teacher that `config.teacher` names, if it has been read already.

    Raises:
      UserError: a setting, the data or the teacher will not do.
    """
    check_numbers(config)
    check_devices(config, jax.device_count())
    config = teacher.resolve(config)
    recipe = views.build(config.augment, config.views, config.local)
    method = methods.build(config, config.views, config.local.count)
    check_views(recipe, method)
    _check_momentum(config)
    losses = ["loss", *(f"{name}/loss" for name in method.objectives)]
    if config.checkpoint.best_metric not in ("", *losses):
        raise errors.unknown("config.checkpoint.best_metric", config.checkpoint.best_metric, losses)
    _check_patterns(config, method)
    record = state.shapes(method, recipe.sizes)
    method.check(record)
    source = _bagged(source or pipeline.open_source(config.data), config, method)
    monitor.check(config, source)
    steps_per_epoch = _steps_per_epoch(source, config)
    method = method.paced(steps_per_epoch)
    if "teacher" not in method.plan:
        loaded = None
    elif loaded is None:
        encoder = method.networks["teacher"].encoder
        loaded = teacher.load(config.teacher, encoder, config.augment.size)
    ready = Prepared(
        config=config,
        recipe=recipe,
        method=method,
        source=source,
        steps_per_epoch=steps_per_epoch,
        total=config.total_steps or config.total_epochs * steps_per_epoch,
        built=step.from_config(config, method, recipe, steps_per_epoch),
        teacher=loaded,
        record=record,
    )
    return _cached(ready) if config.teacher.cache else ready


def _cached(ready: Prepared) -> Prepared:
    """The run with the teacher's outputs from `config.teacher.cache`."""
    config = ready.config
    if ready.teacher is None:
        raise errors.UserError("config.teacher.cache is set, but no objective reads a teacher.")
    told = cached.made_of(config, ready.method, ready.record, ready.source, ready.teacher)
    kept = cached.opened(config.teacher.cache, told)
    built = step.from_config(
        config, ready.method, ready.recipe, ready.steps_per_epoch, period=len(kept)
    )
    source = targets.ReplayedSource(ready.source, kept)
    return dataclasses.replace(ready, source=source, built=built, period=len(kept))


def check_numbers(config: ConfigDict) -> None:
    """Refuses numbers that would only fail, or do nothing, hours later."""
    least = {
        "batch_size": 1,
        "total_epochs": 1,
        "total_steps": 0,
        "views": 1,
        "log.every_steps": 1,
        "checkpoint.every_steps": 1,
        "checkpoint.keep": 1,
        "log.replicas_every_steps": 0,
        "log.hang_s": 0,
        "momentum.ema_rate": 0,
        "health.min_std": 0,
        "health.patience": 1,
        "data.max_unreadable": 0,
        "data.max_unreadable_percent": 0,
        "monitor.knn_every_steps": 0,
        "monitor.images": 0,
        "monitor.k": 1,
    }
    values = {name: functools.reduce(getattr, name.split("."), config) for name in least}
    low = [f"config.{n}={v} is below {least[n]}." for n, v in values.items() if v < least[n]]
    if config.momentum.ema_rate > 1:
        low.append(f"config.momentum.ema_rate={config.momentum.ema_rate} is above 1.")
    if low:
        raise errors.UserError("\n  ".join(low))


def _bagged(source: Source, config: ConfigDict, method: Method) -> Source:
    """The source with the bags that some objective reads."""
    members = {view for o in method.objectives.values() for view in o.members}
    if not config.bags.file:
        return source
    bags = Bags.load(config.bags.file)
    classifies = any("cluster" in o.aux for o in method.objectives.values())
    if not members and not classifies:
        raise errors.UserError(
            f"config.bags.file={config.bags.file!r}, but no objective reads bags: leave it empty, "
            "or give config.objectives.bags or .pseudo_labels a weight."
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
    """Refuses pseudo labels that the student's prototypes do not count."""
    if bags.clusters is None:
        raise errors.UserError(
            "config.objectives.pseudo_labels needs clusters, and config.bags.file holds "
            "neighbours: make it with `disco-jax bags --config.kind=kmeans`."
        )
    count, classes = int(bags.clusters.max()) + 1, sum(config.student.prototypes)
    if count > classes:
        raise errors.UserError(
            f"config.student.prototypes={tuple(config.student.prototypes)} are fewer than the "
            f"{count} clusters of config.bags.file: set config.student.prototypes=({count},)."
        )


def check_views(recipe: views.Recipe, method: Method) -> None:
    """Refuses views that cost time and that nobody reads."""
    read = {view for wanted in method.plan.values() for view in wanted}
    idle = sorted(set(range(len(recipe.crops))) - read)
    if idle:
        raise errors.UserError(
            f"The recipe makes view {idle[0]}, which no objective reads: lower config.views or "
            "config.local.count, or let an objective read it (config.objectives.*.views, .pairs)."
        )


def _check_momentum(config: ConfigDict) -> None:
    if config.momentum.follow not in ("before", "after"):
        raise errors.unknown("config.momentum.follow", config.momentum.follow, ("before", "after"))
    if config.momentum.ema_rate_end > 1:
        raise errors.UserError(
            f"config.momentum.ema_rate_end={config.momentum.ema_rate_end} must be a share in 0..1, "
            "or -1 for a constant rate."
        )


def _check_patterns(config: ConfigDict, method: Method) -> None:
    """Refuses patterns of parameters that there are not."""
    if any(config.optimizer[field] for field in ("frozen", "fixed", "unit_norm")):
        encoder = method.networks["student"].encoder
        params = jax.eval_shape(lambda: encoder.create(0, config.augment.size))["params"]
        optimizer.check_patterns(config.optimizer, params)


def check_devices(config: ConfigDict, devices: int) -> None:
    """Refuses a batch that cannot be divided among the devices as the config wants it.

    Raises:
      UserError: config.batch_size or a norm_group does not divide.
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
                f"images of a device; what does: {', '.join(map(str, fits))}, or 0 for all of them."
            )
    group = config.objectives.relations.group
    if config.objectives.relations.weight and group and (batch // devices) % group:
        raise errors.UserError(
            f"config.objectives.relations.group={group} does not divide the {batch // devices} "
            "images of a device; take a divisor, or 0 for all of them."
        )


def _steps_per_epoch(source: Source, config: ConfigDict) -> int:
    count = source.count(config.data.train_split)
    if count < config.batch_size:
        raise errors.UserError(
            f"config.batch_size={config.batch_size} is more than the {count} images of "
            f"{source.name}, split {config.data.train_split!r}."
        )
    return (count // jax.process_count()) // (config.batch_size // jax.process_count())
