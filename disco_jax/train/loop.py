"""The training loop, shared by pretraining and all probes."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from disco_jax.errors import Interrupted, Preempted
from disco_jax.run import hosts
from disco_jax.run.goodput import Goodput
from disco_jax.run.metrics import Progress
from disco_jax.train import replicas
from disco_jax.train.state import gather_to_host
from disco_jax.train.summary import check_state, summarise

# Steps that may be enqueued on the device before the host waits: enough to hide the host's work,
# few enough that enqueued batches do not fill the device's memory.
IN_FLIGHT = 4


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The length of a loop and the intervals of its periodic actions.

    Attributes:
      start: number of steps taken before.
      total: number of the last step.
      steps_per_epoch: for the progress line.
      batch_size: over all devices, for the rates.
      log_steps: steps between two log lines.
      checkpoint_steps: steps between two checkpoints.
      evaluate_steps: steps between two evaluations; 0: none.
      evaluate_first: number of first steps that are also followed by an evaluation each.
      verbose: whether process 0 prints the progress line.
      replica_check_steps: steps between two comparisons of all replicas; 0: none.
      hang_s: seconds without a completed step after which the process ends, including the time
        for compiling, evaluating and saving; 0: never.
      profile: first and last step to trace, counted from this start; (): none.
      profile_dir: output directory of the trace.
    """

    start: int
    total: int
    steps_per_epoch: int
    batch_size: int
    log_steps: int = 50
    checkpoint_steps: int = 1000
    evaluate_steps: int = 0
    evaluate_first: int = 0
    verbose: bool = True
    replica_check_steps: int = 0
    hang_s: float = 0.0
    profile: tuple[int, ...] = ()
    profile_dir: str = ""

    def progress(self) -> Progress:
        """Creates the progress display of this loop."""
        return Progress(self.start, self.total, self.steps_per_epoch, self.batch_size)


class Log(Protocol):
    """A writer of metrics: `Logger`, or `JointLogger` for several runs."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the metrics of a step; see `Logger.write`."""


class Store(Protocol):
    """A writer of states: `Checkpoints`, or `JointCheckpoints` for several runs."""

    def save(
        self,
        step: int,
        state: Any,
        position: Sequence[Sequence[int]],
        metrics: Mapping[str, float],
        /,
    ) -> None:
        """Saves the state of a step; see `Checkpoints.save`."""

    def wait(self) -> None:
        """Waits for the last checkpoint; see `Checkpoints.wait`."""


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
    """Takes steps until `schedule.total`, and logs, evaluates and saves at its intervals.

    Args:
      step_fn: (state, frozen, batch) -> (state, metrics); donates the state.
      state: a copy on every device; see `state.replicate`.
      frozen: variables that the step reads and never changes, also on every device.
      batches: iterator of (batch, position): the batch in the layout of the step, and the data
        position of the next batch. If it has an attribute `waited_s`, this is the total number of
        seconds spent waiting for batches.
      schedule: length and intervals.
      logger: for the metrics.
      checkpoints: None: nothing is saved, as in a probe.
      watch: called with every logged summary; may raise to end the run.
      goodput: account of the time spent; None: none is kept.
      evaluate: (step, state) -> metrics, called every `schedule.evaluate_steps` steps and after
        the last step; must not change or donate the state.
      summary_of: (metrics of the last steps, step) -> scalars to log.
      check: (step, state) -> None, called before a state is saved; may raise to end the run.

    Returns:
      The last state.

    Raises:
      NumericError: a loss, a gradient or a state to save is not finite, or replicas differ. The
        state is not saved then.
      Preempted: any process received SIGTERM, or the terminal was closed. The state was saved, if
        `checkpoints` is set.
      Interrupted: the same after Ctrl-C.
    """
    progress = schedule.progress()
    saver = _Saver(checkpoints, goodput, batches, check)
    window = _Window(summary_of, logger, progress if schedule.verbose else None)
    actions = _Actions(schedule, logger, window, saver, progress, watch, evaluate)
    return _take_steps(step_fn, state, frozen, batches, schedule, saver, actions, window)


def _take_steps(
    step_fn: Callable[[Any, Any, Any], tuple[Any, Any]],
    state: Any,
    frozen: Any,
    batches: Any,
    schedule: Schedule,
    saver: "_Saver",
    actions: "_Actions",
    window: "_Window",
) -> Any:
    """Takes the steps of `run` with the periodic actions after each; returns the last state."""
    with (
        contextlib.closing(hosts.Watchdog(schedule.hang_s)) as watchdog,
        contextlib.closing(_Profiler(schedule)) as profiler,
        hosts.stop_on_signals() as stop_requested,
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
            stopping = stop_requested(step)
            actions.take(step, state, position, stopping)
            watchdog.alive(step)
            if stopping and step < schedule.total:
                saver.wait()
                raise _stopped(step, saver.saves, stop_requested.interrupted)
        saver.wait()
    return state


def _stopped(step: int, saved: bool, interrupted: bool) -> Preempted:
    outcome = f"step {step} is saved" if saved else f"the {step} steps are not saved"
    return (Interrupted if interrupted else Preempted)(
        f"Stopped on request; {outcome}. Run the same command again to continue."
    )


class _Window:
    """The metrics of the steps since the last log line, kept on the device until the next one."""

    def __init__(self, summary_of: Callable, logger: Log, progress: Progress | None):
        """Creates an empty window.

        Args:
          summary_of: see `run`.
          logger: for the summaries.
          progress: formats the printed progress line; None: no line is printed.
        """
        self._summary_of, self._logger, self._progress = summary_of, logger, progress
        self._metrics: list[Any] = []

    def add(self, metrics: Any) -> None:
        """Adds the metrics of a step; waits while more than `IN_FLIGHT` steps are enqueued."""
        self._metrics.append(metrics)
        if len(self._metrics) > IN_FLIGHT:
            jax.block_until_ready(self._metrics[-IN_FLIGHT])

    def flush(self, step: int, rates: Mapping[str, float]) -> dict[str, float]:
        """Logs the summary with `rates`, prints the progress line, and empties the window."""
        summary = self._summary_of(self._metrics, step) | rates
        self._metrics = []
        self._logger.write(step, summary)
        if self._progress and jax.process_index() == 0:
            print(self._progress.line(step, summary), flush=True)
        return summary


class _Saver:
    """Saves checkpoints, and records in `goodput` how the time of the loop is spent."""

    def __init__(
        self, checkpoints: Store | None, goodput: Goodput | None, batches: Any, check: Callable
    ):
        self._checkpoints, self._goodput = checkpoints, goodput
        self._batches, self._check = batches, check

    @property
    def saves(self) -> bool:
        """True if states are saved."""
        return bool(self._checkpoints)

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for batches since the start of the loop."""
        return getattr(self._batches, "waited_s", 0.0)

    def begin(self) -> None:
        if self._goodput:
            self._goodput.begin()

    def measure(self) -> dict[str, float]:
        """Records the time since the last call as steps; returns the account of the run so far."""
        if not self._goodput:
            return {}
        self._goodput.step(self.waited_s)
        self._goodput.write()
        return self._goodput.report()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Records the time inside the context as an evaluation."""
        self.measure()
        yield
        if self._goodput:
            self._goodput.evaluate()
            self._goodput.write()

    def save(self, step: int, state: Any, position: tuple[int, int], summary: Any) -> None:
        assert self._checkpoints is not None
        self.measure()
        stored = gather_to_host(state)
        self._check(step, stored)
        self._checkpoints.save(step, stored, hosts.all_gather(position), summary)
        self._book()

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk."""
        if self._checkpoints:
            self._checkpoints.wait()
            self._book()

    def _book(self) -> None:
        if self._goodput:
            self._goodput.save()
            self._goodput.write()


class _Actions:
    """The actions after a step at the intervals of a schedule: log, compare, evaluate, save."""

    def __init__(
        self,
        schedule: Schedule,
        logger: Log,
        window: _Window,
        saver: _Saver,
        progress: Progress,
        watch: Callable[[int, Mapping[str, float]], None],
        evaluate: Callable[[int, Any], Mapping[str, float]] | None,
    ):
        """Stores the parts of a loop; see `run` for `watch` and `evaluate`."""
        self._schedule, self._logger, self._window = schedule, logger, window
        self._saver, self._progress = saver, progress
        self._watch, self._evaluate = watch, evaluate

    def take(self, step: int, state: Any, position: tuple[int, int], stopping: bool) -> None:
        """Takes the actions that are due.

        Args:
          step: number of the last step.
          state: after this step, on the devices.
          position: data position of the next batch.
          stopping: the loop ends after this step, so that it is logged and saved.
        """
        schedule, summary = self._schedule, {}
        last = step == schedule.total
        ending = last or stopping
        save = self._saver.saves and (ending or step % schedule.checkpoint_steps == 0)
        if last or save or step % schedule.log_steps == 0:
            rates = self._progress.measure(step, self._saver.waited_s)
            summary = self._window.flush(step, rates | self._saver.measure())
            self._watch(step, summary)
        if _due(step, False, schedule.replica_check_steps):
            replicas.check(state, step)
        if step <= schedule.evaluate_first or _due(step, last, schedule.evaluate_steps):
            assert self._evaluate is not None, "a schedule with evaluations needs one"
            with self._progress.aside(), self._saver.aside():
                self._logger.write(step, self._evaluate(step, state))
        if save:
            self._saver.save(step, state, position, summary)


def _due(step: int, last: bool, every: int) -> bool:
    """Returns whether a periodic action is due: every `every` steps (0: never) and at the end."""
    return bool(every) and (last or step % every == 0)


class _Profiler:
    """Traces the steps of `schedule.profile`, for xprof and TensorBoard."""

    def __init__(self, schedule: Schedule):
        self._folder, self._running = schedule.profile_dir, False
        first, last = schedule.profile or (0, 0)
        self._first, self._last = schedule.start + first, schedule.start + last
        self._enabled = bool(schedule.profile)

    def before(self, step: int) -> None:
        if self._enabled and step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, metrics: Any) -> None:
        if self._running and step == self._last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Stops the trace if one is running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
