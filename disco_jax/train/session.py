"""The parts of one start of a run: its state, batches, schedule, checkpoint and summary."""

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from disco_jax.data import darkness, pipeline, views
from disco_jax.data.contract import Position
from disco_jax.run.workdir import begin_anew
from disco_jax.train import loop, state
from disco_jax.train.run_settings import RunSettings

if TYPE_CHECKING:
    from disco_jax.train.prepare import Prepared

_LOG = logging.getLogger(__name__)


def fresh(ready: "Prepared") -> state.TrainState:
    """Creates the state at step 0."""
    return ready.experiment.initial_state(
        ready.built,
        teacher=ready.teacher.variables if ready.teacher else None,
        queue=ready.teacher.queue if ready.teacher else None,
        started=ready.started,
    )


def batches_of(ready: "Prepared", position: Position) -> pipeline.Prefetcher:
    """Returns a prefetcher of this host's batches from `position`, each with its end position."""
    settings = ready.settings
    crops = ready.source.train(
        settings.data.train_split,
        dict(enumerate(ready.experiment.views.crops)),
        settings.batch_size // jax.process_count(),
        settings.seed,
        position,
        pipeline.unreadable_limit(settings.data, ready.source, settings.data.train_split),
    )
    return pipeline.Prefetcher(crops, transform=_lay_out)


def schedule(
    ready: "Prepared", start: int, path: epath.Path, profile_steps: tuple[int, ...] = ()
) -> loop.Schedule:
    """Builds the loop's schedule from the settings.

    Args:
      ready: the run.
      start: number of steps already taken.
      path: the run's directory.
      profile_steps: see `loop.Schedule.profile`.
    """
    settings = ready.settings
    return loop.Schedule(
        start=start,
        total=ready.experiment.total_steps,
        steps_per_epoch=ready.experiment.steps_per_epoch,
        batch_size=settings.batch_size,
        log_steps=settings.log.every_steps,
        checkpoint_steps=settings.checkpoint.every_steps,
        replica_check_steps=settings.log.replicas_every_steps,
        hang_s=settings.log.hang_s,
        profile=profile_steps,
        profile_dir=str(path / "profile"),
        evaluate_steps=settings.monitor.knn_every_steps,
    )


def _lay_out(batch: Any) -> tuple[dict[str, Any], tuple[int, int]]:
    """Moves a host's batch to the devices as [local_devices, B, ...]; adds the next position."""
    tree = pipeline.to_devices({"views": batch.views, "aux": batch.aux}, jax.local_device_count())
    return state.shard_batch(tree), (batch.position.epoch, batch.position.offset)


def images_of(ready: "Prepared") -> Callable[[], Mapping[str, Any]]:
    """Returns a function that computes the fingerprint of a run's images.

    See `Source.fingerprint`.
    """
    split = ready.settings.data.train_split
    return lambda: ready.source.fingerprint(split)


def resume(checkpoints: Any, fresh: Any, anew: epath.Path | None = None) -> tuple[Any, Position]:
    """Returns the newest good checkpoint and this host's position in the data.

    Without checkpoints it returns the fresh state and the start position.

    Args:
      checkpoints: `Checkpoints` of a run, or of several runs.
      fresh: state at step 0, or those of the runs.
      anew: the run's directory if the run may start over although its checkpoints are missing.

    Raises:
      UserError: see `Checkpoints.restore`; or all checkpoints of an earlier start are missing.
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
    # Shards depend on the number of hosts, so only the number of images read so far is restored.
    epoch, offset = max(map(tuple, hosts))
    _LOG.warning(
        "The checkpoint was saved by %d hosts, now there are %d: the order of images changes.",
        len(hosts),
        jax.process_count(),
    )
    return resumed, Position(epoch, offset * len(hosts) // jax.process_count())


def warn_if_dark(ready: "Prepared") -> None:
    """Logs a warning if the training images are nearly black."""
    if jax.process_index():
        return
    value = darkness.brightest(ready.source, ready.settings.data.train_split)
    if dark := darkness.warning(ready.source.name, value):
        _LOG.warning(dark)


def describe(ready: "Prepared", begin: state.TrainState) -> None:
    """Prints a summary of the run: parameters, forward passes, devices, steps, initialisation."""
    from clu import parameter_overview

    settings = ready.settings
    if jax.process_index():
        return
    params = begin.student["params"]
    _LOG.info("Student:\n%s", parameter_overview.get_parameter_overview(params))
    backbone, total = (
        sum(x.size for x in jax.tree.leaves(tree)) / 2**20 for tree in (params["backbone"], params)
    )
    count = sum(map(len, ready.method.plan.values()))
    frozen = sum(x.size for x in jax.tree.leaves(ready.method.split(params)[1])) / 2**20
    trainable = f", {total - frozen:.2f} M of it trainable" if frozen else ""
    passes = ", ".join(f"{name} {list(views)}" for name, views in ready.method.plan.items())
    print(
        f"{settings.name or 'run'}: student {settings.student.backbone}, backbone "
        f"{backbone:.2f} M, with head {total:.2f} M (M = 2^20, as in the papers){trainable}; "
        f"{count} forward passes a step: {passes}; "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}; "
        f"{ready.experiment.total_steps} steps, {ready.experiment.steps_per_epoch} per epoch"
        + ("; queue initialized from the teacher" if ready.teacher and ready.teacher.queue else "")
        + (f"; student initialized from {settings.student.weights}" if ready.started else ""),
        flush=True,
    )
    if settings.local.count:
        print(_view_recipe(ready.experiment.views, settings), flush=True)


def _view_recipe(recipe: views.Recipe, settings: RunSettings) -> str:
    """Formats SSLight's four axes of view sampling and the mean ratio of pixel scales."""
    first, last = recipe.crops[0], recipe.crops[-1]
    ratio = views.pixel_scale_ratio(first, last)
    return (
        f"views: {settings.views} global of {first.size} px from {first.scale[0]:g} to "
        f"{first.scale[1]:g} of the area, {settings.local.count} local of {last.size} px from "
        f"{last.scale[0]:g} to {last.scale[1]:g}; mean pixel scale of global views divided by that "
        f"of local views: {ratio:.2f} (1.0 is best according to SSLight, arXiv:2210.02808)"
    )
