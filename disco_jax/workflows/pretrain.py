"""Trains one student, from its config to its last step."""

import contextlib
import logging
import time
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors
from disco_jax.data.contract import Position, Source
from disco_jax.evaluate import monitor
from disco_jax.report import build, sheet
from disco_jax.run import checkpoint, unreadable
from disco_jax.run.goodput import Goodput
from disco_jax.run.metrics import Logger
from disco_jax.run.workdir import ANEW, claim
from disco_jax.train import health, loop, session, state, step
from disco_jax.train.prepare import Prepared, prepare, starting

_LOG = logging.getLogger(__name__)


def run(
    config: ConfigDict,
    workdir: str,
    source: Source | None = None,
    *,
    profile: str = "",
    allow_change: str = "",
) -> dict[str, Any]:
    """Trains `config` to its last step, resuming from the newest checkpoint if there is one.

    Args:
      config: see `configs/common.py`.
      workdir: the run's directory.
      source: images; None opens `config.data`.
      profile: "10:15" traces steps 10 to 15 of this start into `workdir`/profile.
      allow_change: comma-separated config fields that may differ from the first start of the run
        in `workdir`.

    Returns:
      {"step", "workdir", "seconds"}.

    Raises:
      UserError: a setting, the data or the directory is invalid; no file was changed.
      NumericError, Preempted: see `loop.run`.
    """
    started = time.monotonic()
    profile_steps = _parse_profile(profile)
    ready = starting(prepare(config, source), workdir)
    settings, total = ready.settings, ready.experiment.total_steps
    session.warn_if_dark(ready)
    allowed = [field.removeprefix("config.") for field in filter(None, allow_change.split(","))]
    with (
        claim(workdir, ready.experiment.config, allowed, session.images_of(ready)) as path,
        contextlib.closing(Goodput(path, started)) as goodput,
        contextlib.closing(
            checkpoint.Checkpoints(path, settings.checkpoint.keep, settings.checkpoint.best_metric)
        ) as checkpoints,
    ):
        unreadable.keep(ready.source, path)
        start, position = session.resume(
            checkpoints, session.fresh(ready), path if ANEW in allowed else None
        )
        # The batch size may have changed since the queues were filled.
        start = state.rotate_oldest_first(start, settings.batch_size)
        session.describe(ready, start)
        if int(start.step) < total:
            _train(ready, path, checkpoints, start, position, goodput, profile_steps)
        elif jax.process_index() == 0:
            print(f"{path} is finished: {int(start.step)} of {total} steps are done.")
    build.refresh(settings.log.report, workdir)
    if ready.source.unreadable:
        _LOG.warning("%d images were skipped as unreadable.", len(ready.source.unreadable))
    return {"step": total, "workdir": str(path), "seconds": time.monotonic() - started}


def _train(
    ready: Prepared,
    path: epath.Path,
    checkpoints: checkpoint.Checkpoints,
    begin: state.TrainState,
    position: Position,
    goodput: Goodput,
    profile_steps: tuple[int, ...],
) -> None:
    """Runs the training loop from `begin` to the last step."""
    settings = ready.settings
    with (
        contextlib.closing(
            Logger(path, tensorboard=session.tensorboard(settings, path), step=int(begin.step))
        ) as logger,
        session.batches_of(ready, position) as batches,
    ):
        sheet.show(settings, ready.source, path, logger, int(begin.step))
        loop.run(
            step.parallel(ready.built.train_step),
            state.replicate(begin),
            state.replicate(ready.frozen),
            batches,
            session.schedule(ready, int(begin.step), path, profile_steps),
            logger,
            checkpoints,
            health.Watch(settings.health),
            goodput,
            monitor.knn_of(settings, ready.method.networks["student"].encoder, ready.source),
        )
    _LOG.info("Compiling took %.1f s over all starts.", goodput.compile_s)


def _parse_profile(text: str) -> tuple[int, ...]:
    """Parses "10:15" to (10, 15), "" to ()."""
    if not text:
        return ()
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise errors.UserError(f"--profile={text!r} must be FIRST:LAST, e.g. 10:15, from 1 up.")
    return int(first), int(last)
