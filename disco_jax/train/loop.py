"""The only loop: pretraining and every probe run through it."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from disco_jax.errors import Preempted
from disco_jax.train.checkpoint import Checkpoints
from disco_jax.train.metrics import Logger, Progress, summarise

# Steps that may be under way on the device before the host waits: enough to hide the host's work,
# few enough that waiting batches do not fill the device's memory.
IN_FLIGHT = 4


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long a loop runs and how often it looks up.

    Attributes:
      start: steps already taken.
      total: the step to stop after.
      steps_per_epoch: for the progress line.
      batch_size: over all devices, for the rates.
      log_steps: steps between two log lines.
      checkpoint_steps: steps between two checkpoints.
      evaluate_steps: steps between two evaluations; 0: none.
      verbose: whether process 0 prints the progress line.
    """

    start: int
    total: int
    steps_per_epoch: int
    batch_size: int
    log_steps: int = 50
    checkpoint_steps: int = 1000
    evaluate_steps: int = 0
    verbose: bool = True


def run(
    step_fn: Callable[[Any, Any, Any], tuple[Any, Any]],
    state: Any,
    frozen: Any,
    batches: Any,
    schedule: Schedule,
    logger: Logger,
    checkpoints: Checkpoints | None = None,
    evaluate: Callable[[int, Any], Mapping[str, float]] | None = None,
) -> Any:
    """Takes steps until `schedule.total`, logging and saving on the way.

    Args:
      step_fn: (state, frozen, batch) -> (state, metrics); donates the state.
      state: on every device; see `state.everywhere`.
      frozen: what the step reads and never changes, likewise.
      batches: iterator of (batch, position), the batch laid out for the step, the position that
        of the next one; an attribute `waited_s`, if there is one, counts the seconds spent
        waiting for it.
      schedule: when to do what.
      logger: for the metrics.
      checkpoints: None saves nothing, as a probe does.
      evaluate: (step, state) -> metrics, called every `schedule.evaluate_steps` steps and after
        the last one; it must leave the state alone.

    Returns:
      The last state.

    Raises:
      NumericError: a loss or gradient is not finite; nothing of it was saved.
      Preempted: SIGTERM came; the state was saved first.
    """
    window: list[Any] = []
    progress = Progress(
        schedule.start, schedule.total, schedule.steps_per_epoch, schedule.batch_size
    )
    with _terminated() as stop:
        for step in range(schedule.start + 1, schedule.total + 1):
            batch, position = next(batches)
            state, metrics = step_fn(state, frozen, batch)
            window.append(metrics)
            if len(window) > IN_FLIGHT:
                jax.block_until_ready(window[-IN_FLIGHT])
            last = step == schedule.total
            stopping = checkpoints is not None and stop.is_set()
            save = checkpoints and (last or stopping or step % schedule.checkpoint_steps == 0)
            if last or save or step % schedule.log_steps == 0:
                summary = summarise(window, step)
                window.clear()
                summary |= progress.measure(step, getattr(batches, "waited_s", 0.0))
                logger.write(step, summary)
                if schedule.verbose and jax.process_index() == 0:
                    print(progress.line(step, summary), flush=True)
            if _due(step, last, schedule.evaluate_steps):
                with progress.aside():
                    logger.write(step, evaluate(step, state))
            if save:
                checkpoints.save(step, state, _everyone(position), summary)
            if stopping and not last:
                checkpoints.wait()
                raise Preempted(f"Asked to stop; step {step} is saved. Start again to go on.")
    if checkpoints:
        checkpoints.wait()
    return state


def _due(step: int, last: bool, every: int) -> bool:
    """Whether to evaluate after this step."""
    return bool(every) and (last or step % every == 0)


@contextlib.contextmanager
def _terminated() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, for as long as the context lasts (in the main thread only)."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def _everyone(position: tuple[int, int]) -> list[list[int]]:
    """Every host's (epoch, offset)."""
    if jax.process_count() == 1:
        return [list(position)]
    return multihost_utils.process_allgather(jax.numpy.asarray(position)).tolist()
