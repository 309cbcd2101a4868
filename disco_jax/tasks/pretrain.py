"""Pretrain or distil a student: any method, from one config."""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors
from disco_jax.data import darkness, pipeline, views
from disco_jax.data.base import Position, Source
from disco_jax.evaluate import monitor
from disco_jax.report import build
from disco_jax.tasks import report
from disco_jax.tasks.prepare import Prepared, prepare, starting
from disco_jax.train import checkpoint, health, loop, state, step, unreadable
from disco_jax.train.goodput import Goodput
from disco_jax.train.metrics import Logger
from disco_jax.train.workdir import ANEW, begin_anew, claim

_LOG = logging.getLogger(__name__)


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
    ready = starting(prepare(config, source), workdir)
    config = ready.config
    warn_if_dark(ready)
    allowed = [field.removeprefix("config.") for field in filter(None, allow_change.split(","))]
    with (
        claim(workdir, config, allowed, images_of(ready)) as path,
        contextlib.closing(Goodput(path, started)) as goodput,
        contextlib.closing(
            checkpoint.Checkpoints(path, config.checkpoint.keep, config.checkpoint.best_metric)
        ) as checkpoints,
    ):
        unreadable.keep(ready.source, path)
        begin, position = resume(checkpoints, fresh(ready), path if ANEW in allowed else None)
        begin = state.refilled_by(begin, config.batch_size)  # it may have been another
        describe(ready, begin)
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
    with (
        contextlib.closing(
            Logger(path, tensorboard=tensorboard(config, path), step=int(begin.step))
        ) as logger,
        batches_of(ready, position) as batches,
    ):
        show_views(config, ready.source, path, logger, int(begin.step))
        loop.run(
            step.parallel(ready.built.train_step),
            state.everywhere(begin),
            state.everywhere(ready.frozen),
            batches,
            schedule(ready, int(begin.step), path, traced),
            logger,
            checkpoints,
            health.Watch(config.health.min_std, config.health.patience, config.health.stop),
            goodput,
            monitor.knn_of(config, ready.method.networks["student"].encoder, ready.source),
        )
    _LOG.info("Compiling took %.1f s over all starts.", goodput.compile_s)


def fresh(ready: Prepared) -> state.TrainState:
    """The state at step 0."""
    config = ready.config
    return state.create(
        ready.method,
        ready.built.learner.tx,
        config.seed,
        config.augment.size,
        inherited=ready.teacher.queue if ready.teacher else None,
        reused=ready.teacher.variables if ready.teacher else None,
        started=ready.started,
        record=ready.record,
    )


def batches_of(ready: Prepared, position: Position) -> pipeline.Prefetcher:
    """This host's batches from a place on, laid out for the step, and the place after each."""
    config = ready.config
    crops = ready.source.train(
        config.data.train_split,
        dict(enumerate(ready.recipe.crops)),
        config.batch_size // jax.process_count(),
        config.seed,
        position,
        pipeline.unreadable_limit(config.data, ready.source, config.data.train_split),
    )
    return pipeline.Prefetcher(crops, transform=_lay_out)


def schedule(
    ready: Prepared, start: int, path: epath.Path, traced: tuple[int, ...] = ()
) -> loop.Schedule:
    """The loop's, as the config says.

    Args:
      ready: the run.
      start: steps already taken.
      path: of the run.
      traced: see `loop.Schedule.profile`.
    """
    config = ready.config
    return loop.Schedule(
        start=start,
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
    )


def show_views(
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


def images_of(ready: Prepared) -> Callable[[], Mapping[str, Any]]:
    """Returns a function that tells what images a run trains on; see `Source.fingerprint`."""
    split = ready.config.data.train_split
    return lambda: ready.source.fingerprint(split)


def resume(checkpoints: Any, fresh: Any, anew: epath.Path | None = None) -> tuple[Any, Position]:
    """Returns the newest good checkpoint and this host's place in the data, or the fresh state.

    Args:
      checkpoints: `Checkpoints`, or those of several runs.
      fresh: the state at step 0, or those of the runs.
      anew: the directory, where the run may begin anew although its checkpoints are gone.

    Raises:
      UserError: see `Checkpoints.restore`; or there were checkpoints and all are gone.
    """
    restored = checkpoints.restore(fresh)
    if restored is None and anew is not None:
        begin_anew(anew)
    elif restored is None:
        checkpoints.check_none_lost()
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


def tensorboard(config: ConfigDict, path: epath.Path) -> bool:
    """In a bucket only beside a TensorFlow source: the others must not need TensorFlow."""
    return config.log.tensorboard and ("://" not in str(path) or config.data.source == "tfds")


def warn_if_dark(ready: Prepared) -> None:
    """Logs a warning if the images for training are nearly black."""
    if jax.process_index():
        return
    value = darkness.brightest(ready.source, ready.config.data.train_split)
    if dark := darkness.warning(ready.source.name, value):
        _LOG.warning(dark)


def describe(ready: Prepared, begin: state.TrainState) -> None:
    """Says what is about to be trained: parameters, forward passes, where the queue is from."""
    from clu import parameter_overview

    config = ready.config
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
        + ("; a queue came with the teacher" if ready.teacher and ready.teacher.queue else "")
        + (f"; the student starts from {config.student.weights}" if ready.started else ""),
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
