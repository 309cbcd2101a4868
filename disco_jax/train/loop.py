"""The only loop: pretraining and every probe run through it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from disco_jax.errors import Interrupted, Preempted
from disco_jax.train import hosts, replicas
from disco_jax.train.goodput import Goodput
from disco_jax.train.metrics import Progress, check_state, summarise
from disco_jax.train.state import whole

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
      replica_check_steps: steps between two comparisons of all replicas; 0: none.
      hang_s: seconds without a step, what is compiled, evaluated and saved with it included,
        after which the process ends; 0: never.
      profile: (first, last) of the steps of this start that are traced, () for none.
      profile_dir: where to.
    """

    start: int
    total: int
    steps_per_epoch: int
    batch_size: int
    log_steps: int = 50
    checkpoint_steps: int = 1000
    evaluate_steps: int = 0
    verbose: bool = True
    replica_check_steps: int = 0
    hang_s: float = 0.0
    profile: tuple[int, ...] = ()
    profile_dir: str = ""

    def progress(self) -> Progress:
        """Of this loop, from its start."""
        return Progress(self.start, self.total, self.steps_per_epoch, self.batch_size)


class Log(Protocol):
    """Takes metrics: a `Logger`, or a `JointLogger` of several runs."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Logger.write`."""


class Store(Protocol):
    """Takes states: `Checkpoints`, or the `JointCheckpoints` of several runs."""

    def save(
        self,
        step: int,
        state: Any,
        position: Sequence[Sequence[int]],
        metrics: Mapping[str, float],
        /,
    ) -> None:
        """See `Checkpoints.save`."""

    def wait(self) -> None:
        """See `Checkpoints.wait`."""


def run(
    step_fn: Callable[[Any, Any, Any], tuple[Any, Any]],
    state: Any,
    frozen: Any,
    batches: Any,
    schedule: Schedule,
    logger: Log,
    checkpoints: Store | None = None,
    watch: Callable[[int, Mapping[str, float]], None] = lambda step, summary: None,
    goodput: Goodput | None = None,
    evaluate: Callable[[int, Any], Mapping[str, float]] | None = None,
    summary_of: Callable[[Sequence[Any], int], dict[str, float]] = summarise,
    check: Callable[[int, Any], None] = check_state,
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
      watch: called with every summary that is logged; may raise to end the run.
      goodput: where the time is booked; None: nowhere.
      evaluate: (step, state) -> metrics, called every `schedule.evaluate_steps` steps and after
        the last one; it must leave the state alone.
      summary_of: (metrics of the last steps, step) -> what is logged of them.
      check: (step, state) -> None, called before a state is saved; may raise to end the run.

    Returns:
      The last state.

    Raises:
      NumericError: a loss, a gradient or a state to save is not finite, or replicas differ;
        nothing of it was saved.
      Preempted: SIGTERM came, to any process, or the terminal was closed; the state was saved
        first, where there are checkpoints.
      Interrupted: the same after Ctrl-C.
    """
    progress = schedule.progress()
    watchdog = hosts.Watchdog(schedule.hang_s)
    saver = _Saver(checkpoints, goodput, batches, check)
    window = _Window(summary_of, logger, progress if schedule.verbose else None)
    with (
        contextlib.closing(watchdog),
        contextlib.closing(_Profiler(schedule)) as profiler,
        hosts.asked_to_stop() as asked,
    ):
        saver.begin()
        watchdog.alive(schedule.start)
        if jax.process_count() > 1:
            replicas.check(state, schedule.start)
        for step in range(schedule.start + 1, schedule.total + 1):
            profiler.before(step)
            batch, position = next(batches)
            state, metrics = step_fn(state, frozen, batch)
            window.add(metrics)
            profiler.after(step, metrics)
            last = step == schedule.total
            stopping = asked(step)
            save = checkpoints and (last or stopping or step % schedule.checkpoint_steps == 0)
            if last or save or step % schedule.log_steps == 0:
                rates = progress.measure(step, getattr(batches, "waited_s", 0.0))
                summary = window.tell(step, rates | saver.measure())
                watch(step, summary)
            if _due(step, False, schedule.replica_check_steps):
                replicas.check(state, step)
            if _due(step, last, schedule.evaluate_steps):
                assert evaluate is not None, "a schedule with evaluations needs one"
                with progress.aside(), saver.aside():
                    logger.write(step, evaluate(step, state))
            if save:
                saver.save(step, state, position, summary)
            watchdog.alive(step)
            if stopping and not last:
                saver.wait()
                raise _stopped(step, bool(checkpoints), asked.interrupted)
        saver.wait()
    return state


def _stopped(step: int, saved: bool, interrupted: bool) -> Preempted:
    told = f"step {step} is saved" if saved else f"nothing is kept of the {step} steps"
    return (Interrupted if interrupted else Preempted)(
        f"Asked to stop; {told}. Start again to go on."
    )


class _Window:
    """The metrics of the steps since the last log line, left on the device until then."""

    def __init__(self, summary_of: Callable, logger: Log, progress: Progress | None):
        """Empty.

        Args:
          summary_of: see `run`.
          logger: for what comes of it.
          progress: of the line that is printed; None: none is.
        """
        self._summary_of, self._logger, self._progress = summary_of, logger, progress
        self._metrics: list[Any] = []

    def add(self, metrics: Any) -> None:
        """Adds a step's; waits where too many steps are under way."""
        self._metrics.append(metrics)
        if len(self._metrics) > IN_FLIGHT:
            jax.block_until_ready(self._metrics[-IN_FLIGHT])

    def tell(self, step: int, rates: Mapping[str, float]) -> dict[str, float]:
        """Logs a summary with `rates`, prints a line of it, and begins anew."""
        summary = self._summary_of(self._metrics, step) | rates
        self._metrics = []
        self._logger.write(step, summary)
        if self._progress and jax.process_index() == 0:
            print(self._progress.line(step, summary), flush=True)
        return summary


class _Saver:
    """Checkpoints, and where the time of the loop is booked."""

    def __init__(
        self, checkpoints: Store | None, goodput: Goodput | None, batches: Any, check: Callable
    ):
        self._checkpoints, self._goodput = checkpoints, goodput
        self._batches, self._check = batches, check

    def begin(self) -> None:
        if self._goodput:
            self._goodput.begin()

    def measure(self) -> dict[str, float]:
        """Books steps; returns where the time of the run went so far."""
        if not self._goodput:
            return {}
        self._goodput.step(getattr(self._batches, "waited_s", 0.0))
        self._goodput.write()
        return self._goodput.report()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is done inside is booked as an evaluation."""
        self.measure()
        yield
        if self._goodput:
            self._goodput.evaluate()
            self._goodput.write()

    def save(self, step: int, state: Any, position: tuple[int, int], summary: Any) -> None:
        assert self._checkpoints is not None
        self.measure()
        stored = whole(state)
        self._check(step, stored)
        self._checkpoints.save(step, stored, hosts.everyone(position), summary)
        self._book()

    def wait(self) -> None:
        """Returns when what was saved is on the disk."""
        if self._checkpoints:
            self._checkpoints.wait()
            self._book()

    def _book(self) -> None:
        if self._goodput:
            self._goodput.save()
            self._goodput.write()


def _due(step: int, last: bool, every: int) -> bool:
    """Whether it is time, every so many steps (0: never) and, if asked, at the end."""
    return bool(every) and (last or step % every == 0)


class _Profiler:
    """Writes a trace of a few steps, for xprof and TensorBoard."""

    def __init__(self, schedule: Schedule):
        self._folder, self._running = schedule.profile_dir, False
        first, last = schedule.profile or (0, 0)
        self._first, self._last = schedule.start + first, schedule.start + last
        self._wanted = bool(schedule.profile)

    def before(self, step: int) -> None:
        if self._wanted and step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, metrics: Any) -> None:
        if self._running and step == self._last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
