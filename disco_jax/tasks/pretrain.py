"""Pretrain or distil a student: any method, from one config."""

import logging
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from disco_jax import errors, methods
from disco_jax.data import pipeline, views
from disco_jax.data.base import Position, Source
from disco_jax.ops import schedules
from disco_jax.train import checkpoint, loop, optimizer, state, step, teacher, workdir
from disco_jax.train.metrics import Logger

_LOG = logging.getLogger(__name__)


def run(config: ConfigDict, workdir_path: str, source: Source | None = None) -> dict[str, Any]:
    """Trains as `config` says until its last step, from the newest checkpoint if there is one.

    Args:
      config: see `configs/common.py`.
      workdir_path: the run's directory.
      source: images; None opens `config.data`.

    Returns:
      {"step", "workdir", "seconds"}.

    Raises:
      UserError: a setting, the data or the directory will not do; nothing was changed.
      NumericError, Preempted: see `loop.run`.
    """
    started = time.monotonic()
    recipe = views.build(config.augment, config.views)
    method = methods.build(config, views=len(recipe.crops))
    _check_devices(config)
    source = source or pipeline.open_source(config.data)
    steps_per_epoch = _steps_per_epoch(source, config)
    total = config.total_steps or config.total_epochs * steps_per_epoch
    rate = optimizer.learning_rate(
        config.learning_rate, config.batch_size, steps_per_epoch, config.total_epochs
    )
    tx = optimizer.build(config.optimizer, rate)
    frozen, queue = {}, None
    if "teacher" in method.plan:
        loaded = teacher.load(
            config.teacher, method.networks["teacher"].encoder, config.augment.size
        )
        frozen, queue = {"teacher": loaded.variables}, loaded.queue
    with workdir.claim(workdir_path, config) as path:
        checkpoints = checkpoint.Checkpoints(
            path, config.checkpoint.keep, config.checkpoint.best_metric
        )
        train_state = state.create(method, tx, config.seed, config.augment.size, queue)
        train_state, position = _resume(checkpoints, train_state)
        _describe(config, method, train_state, queue)
        train_step = step.make_train_step(
            method,
            recipe,
            tx,
            learning_rate=rate,
            ema_rate=schedules.constant(config.momentum.ema_rate),
            seed=config.seed,
        )
        start = int(train_state.step)
        logger = Logger(path, tensorboard=_tensorboard(config), step=start)
        crops = source.train(
            config.data.train_split,
            dict(enumerate(recipe.crops)),
            config.batch_size // jax.process_count(),
            config.seed,
            position,
            config.data.max_unreadable,
        )
        try:
            with pipeline.Prefetcher(crops, transform=_lay_out) as batches:
                loop.run(
                    step.parallel(train_step),
                    state.everywhere(train_state),
                    state.everywhere(frozen),
                    batches,
                    loop.Schedule(
                        start=start,
                        total=total,
                        steps_per_epoch=steps_per_epoch,
                        batch_size=config.batch_size,
                        log_steps=config.log.every_steps,
                        checkpoint_steps=config.checkpoint.every_steps,
                    ),
                    logger,
                    checkpoints,
                )
        finally:
            logger.close()
            checkpoints.close()
    if source.unreadable:
        _LOG.warning("%d images were skipped as unreadable.", len(source.unreadable))
    return {"step": total, "workdir": str(path), "seconds": time.monotonic() - started}


def _lay_out(batch: Any) -> tuple[dict[str, Any], tuple[int, int]]:
    """A host's batch -> what the step takes, [local_devices, B, ...], and where the next starts."""
    tree = pipeline.to_devices({"views": batch.views, "aux": batch.aux}, jax.local_device_count())
    return tree, (batch.position.epoch, batch.position.offset)


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


def _check_devices(config: ConfigDict) -> None:
    devices, batch = jax.device_count(), config.batch_size
    if batch < 1 or batch % devices:
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


def _steps_per_epoch(source: Source, config: ConfigDict) -> int:
    count = source.count(config.data.train_split)
    if count < config.batch_size:
        raise errors.UserError(
            f"config.batch_size={config.batch_size} is more than the {count} images of "
            f"{source.name}, split {config.data.train_split!r}."
        )
    return (count // jax.process_count()) // (config.batch_size // jax.process_count())


def _tensorboard(config: ConfigDict) -> bool:
    """Only beside a TensorFlow source: the others must not need TensorFlow."""
    return config.log.tensorboard and config.data.source == "tfds"


def _describe(config: ConfigDict, method: Any, train_state: Any, queue: Any) -> None:
    """Logs what is about to be trained: parameters, forward passes, where the queue is from."""
    from clu import parameter_overview

    if jax.process_index():
        return
    student = train_state.student
    _LOG.info("Student:\n%s", parameter_overview.get_parameter_overview(student["params"]))
    backbone = sum(x.size for x in jax.tree.leaves(student["params"]["backbone"]))
    everything = sum(x.size for x in jax.tree.leaves(student["params"]))
    passes = ", ".join(f"{name} {list(v)}" for name, v in method.plan.items())
    print(
        f"{config.name or 'run'}: student {config.student.backbone}, backbone "
        f"{backbone / 2**20:.2f} M, with head {everything / 2**20:.2f} M (M = 2^20, as the papers "
        f"count); forward passes a step: {passes}; {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}"
        + ("; the queue comes from the teacher" if queue is not None else ""),
        flush=True,
    )
