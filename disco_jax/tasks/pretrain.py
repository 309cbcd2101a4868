"""Pretrain or distil a student: any method, from one config."""

import contextlib
import dataclasses
import functools
import logging
import time
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors, methods
from disco_jax.data import pipeline, views
from disco_jax.data.bags import Bags, BagSource
from disco_jax.data.base import Position, Source
from disco_jax.evaluate import monitor
from disco_jax.methods.base import Method, Record
from disco_jax.report import build
from disco_jax.tasks import report
from disco_jax.train import checkpoint, health, loop, optimizer, state, step, teacher
from disco_jax.train.goodput import Goodput
from disco_jax.train.metrics import Logger
from disco_jax.train.workdir import claim

_LOG = logging.getLogger(__name__)


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


def prepare(config: ConfigDict, source: Source | None = None) -> Prepared:
    """Checks a config and opens what it names.

    Raises:
      UserError: a setting, the data or the teacher will not do.
    """
    _check_numbers(config)
    check_devices(config, jax.device_count())
    config = teacher.resolve(config)
    recipe = views.build(config.augment, config.views, config.local)
    method = methods.build(config, config.views, config.local.count)
    _check_views(recipe, method)
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
    loaded = None
    if "teacher" in method.plan:
        encoder = method.networks["teacher"].encoder
        loaded = teacher.load(config.teacher, encoder, config.augment.size)
    return Prepared(
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


def run(
    config: ConfigDict,
    workdir: str,
    source: Source | None = None,
    *,
    profile: str = "",
    allow_change: str = "",
) -> dict[str, Any]:
    """Trains as `config` says until its last step, from the newest checkpoint if there is one.

    Args:
      config: see `configs/common.py`.
      workdir: the run's directory.
      source: images; None opens `config.data`.
      profile: "10:15" traces steps 10 to 15 of this start into `workdir`/profile.
      allow_change: fields of the config, separated by commas, that may differ from what the run
        in `workdir` began with.

    Returns:
      {"step", "workdir", "seconds"}.

    Raises:
      UserError: a setting, the data or the directory will not do; nothing was changed.
      NumericError, Preempted: see `loop.run`.
    """
    started = time.monotonic()
    traced = _steps_to_trace(profile)
    ready = prepare(config, source)
    config = ready.config
    allowed = [field.removeprefix("config.") for field in filter(None, allow_change.split(","))]
    with (
        claim(workdir, config, allowed) as path,
        contextlib.closing(Goodput(path, started)) as goodput,
        contextlib.closing(
            checkpoint.Checkpoints(path, config.checkpoint.keep, config.checkpoint.best_metric)
        ) as checkpoints,
    ):
        fresh = state.create(
            ready.method,
            ready.built.tx,
            config.seed,
            config.augment.size,
            inherited=ready.teacher and ready.teacher.queue,
            reused=ready.teacher and ready.teacher.variables,
            record=ready.record,
        )
        begin, position = _resume(checkpoints, fresh)
        _describe(config, ready, begin)
        if int(begin.step) < ready.total:
            _train(config, ready, path, checkpoints, begin, position, goodput, traced)
        elif jax.process_index() == 0:
            print(f"{path} is finished: {int(begin.step)} of {ready.total} steps are done.")
    build.refresh(config.log.report, workdir)
    if ready.source.unreadable:
        _LOG.warning("%d images were skipped as unreadable.", len(ready.source.unreadable))
    return {"step": ready.total, "workdir": str(path), "seconds": time.monotonic() - started}


def _train(
    config: ConfigDict,
    ready: Prepared,
    path: epath.Path,
    checkpoints: checkpoint.Checkpoints,
    begin: state.TrainState,
    position: Position,
    goodput: Goodput,
    traced: tuple[int, ...],
) -> None:
    """The loop, from `begin` to the last step."""
    crops = ready.source.train(
        config.data.train_split,
        dict(enumerate(ready.recipe.crops)),
        config.batch_size // jax.process_count(),
        config.seed,
        position,
        config.data.max_unreadable,
    )
    frozen = {"teacher": ready.teacher.variables} if ready.teacher else {}
    with (
        contextlib.closing(
            Logger(path, tensorboard=_tensorboard(config, path), step=int(begin.step))
        ) as logger,
        pipeline.Prefetcher(crops, transform=_lay_out) as batches,
    ):
        _show_views(config, ready.source, path, logger, int(begin.step))
        loop.run(
            step.parallel(ready.built.train_step),
            state.everywhere(begin),
            state.everywhere(frozen),
            batches,
            loop.Schedule(
                start=int(begin.step),
                total=ready.total,
                steps_per_epoch=ready.steps_per_epoch,
                batch_size=config.batch_size,
                log_steps=config.log.every_steps,
                checkpoint_steps=config.checkpoint.every_steps,
                replica_check_steps=config.log.replicas_every_steps,
                hang_s=config.log.hang_s,
                profile=traced,
                profile_dir=str(path / "profile"),
                evaluate_steps=config.monitor.knn_every_steps,
            ),
            logger,
            checkpoints,
            health.Watch(config.health.min_std, config.health.patience, config.health.stop),
            goodput,
            monitor.knn_of(config, ready.method.networks["student"].encoder, ready.source),
        )
    _LOG.info("Compiling took %.1f s over all starts.", goodput.compile_s)


def _show_views(
    config: ConfigDict, source: Source, path: epath.Path, logger: Logger, step: int
) -> None:
    """What the networks will see, at a run's first start."""
    if config.log.report and not step and jax.process_index() == 0:
        with build.optional("contact sheet"):
            logger.write_image(step, "views", report.draw_sheet(config, str(path), source))


def _steps_to_trace(given: str) -> tuple[int, ...]:
    """ "10:15" -> (10, 15)."""
    if not given:
        return ()
    first, _, last = given.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise errors.UserError(f"--profile={given!r} must be FIRST:LAST, as 10:15, from 1 up.")
    return int(first), int(last)


def _lay_out(batch: Any) -> tuple[dict[str, Any], tuple[int, int]]:
    """A host's batch -> [local_devices, B, ...] on the devices, and where the next one starts."""
    tree = pipeline.to_devices({"views": batch.views, "aux": batch.aux}, jax.local_device_count())
    return state.apart(tree), (batch.position.epoch, batch.position.offset)


def _resume(
    checkpoints: checkpoint.Checkpoints, fresh: state.TrainState
) -> tuple[state.TrainState, Position]:
    """The newest good checkpoint and this host's place in the data, or the fresh state."""
    restored = checkpoints.restore(fresh)
    if restored is None:
        return fresh, Position.start()
    resumed, meta = restored
    _LOG.info("Resuming after step %d.", meta["step"])
    hosts = meta["position"]
    if len(hosts) == jax.process_count():
        return resumed, Position(*hosts[jax.process_index()])
    # Other hosts, other shards: as many images as before are counted as seen in this epoch.
    epoch, offset = max(map(tuple, hosts))
    _LOG.warning(
        "Saved by %d hosts, now %d: the order of images changes.", len(hosts), jax.process_count()
    )
    return resumed, Position(epoch, offset * len(hosts) // jax.process_count())


def _check_numbers(config: ConfigDict) -> None:
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
    return BagSource(
        source,
        bags,
        sorted(members),
        sampling=config.bags.sampling,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


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


def _check_views(recipe: views.Recipe, method: Method) -> None:
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


def _tensorboard(config: ConfigDict, path: epath.Path) -> bool:
    """In a bucket only beside a TensorFlow source: the others must not need TensorFlow."""
    return config.log.tensorboard and ("://" not in str(path) or config.data.source == "tfds")


def _describe(config: ConfigDict, ready: Prepared, begin: state.TrainState) -> None:
    """Says what is about to be trained: parameters, forward passes, where the queue is from."""
    from clu import parameter_overview

    if jax.process_index():
        return
    params = begin.student["params"]
    _LOG.info("Student:\n%s", parameter_overview.get_parameter_overview(params))
    backbone, everything = (
        sum(x.size for x in jax.tree.leaves(tree)) / 2**20 for tree in (params["backbone"], params)
    )
    count = sum(map(len, ready.method.plan.values()))
    still = sum(x.size for x in jax.tree.leaves(ready.method.split(params)[1])) / 2**20
    frozen = f", {everything - still:.2f} M of it learned" if still else ""
    passes = ", ".join(f"{name} {list(views)}" for name, views in ready.method.plan.items())
    print(
        f"{config.name or 'run'}: student {config.student.backbone}, backbone {backbone:.2f} M, "
        f"with head {everything:.2f} M (M = 2^20, as the papers count){frozen}; {count} forward "
        f"passes a step: {passes}; {jax.device_count()} x {jax.devices()[0].device_kind}; "
        f"{ready.total} steps, {ready.steps_per_epoch} an epoch"
        + ("; a queue came with the teacher" if ready.teacher and ready.teacher.queue else ""),
        flush=True,
    )
    if config.local.count:
        print(_view_recipe(ready.recipe, config), flush=True)


def _view_recipe(recipe: views.Recipe, config: ConfigDict) -> str:
    """The four axes of SSLight's view sampling and the mean ratio of pixel scales, a line."""
    first, last = recipe.crops[0], recipe.crops[-1]
    ratio = views.pixel_scale_ratio(first, last)
    return (
        f"views: {config.views} global of {first.size} px on {first.scale[0]:g} to "
        f"{first.scale[1]:g} of the area, {config.local.count} local of {last.size} px on "
        f"{last.scale[0]:g} to {last.scale[1]:g}; mean pixel scale of a global view over that of a "
        f"local one: {ratio:.2f} (SSLight, arXiv:2210.02808, finds 1.0 best)"
    )
