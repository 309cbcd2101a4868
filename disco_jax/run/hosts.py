"""Multi-process runs: initialization, collectives between hosts, signals and lost processes."""

import contextlib
import faulthandler
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from disco_jax.errors import UserError

Result = TypeVar("Result")

# Maximum length in bytes of an error message that process 0 broadcasts to the others.
_MAX_MESSAGE_BYTES = 4096
# Seconds that a process waits for the others at shutdown.
_SHUTDOWN_S = 60
# Exit code of a process after another process was lost: 128 + SIGABRT, the signal that JAX raises.
LOST = 134
_CONNECTION_LOST = re.compile(
    r"gloo|nccl|connection (reset|closed|refused)|socket closed", re.IGNORECASE
)
# Seconds that a failed process waits for the others to fail too.
_EXIT_GRACE_S = 5.0
_EXIT_KEYS = "disco_jax/left/"
_VARIABLES = "DISCO_JAX_COORDINATOR", "DISCO_JAX_PROCESSES", "DISCO_JAX_PROCESS"


def initialize(
    coordinator: str = "", processes: int = 0, process: int = -1, timeout_s: int = 100
) -> None:
    """Initializes JAX for the processes of a run; call it before any use of JAX's devices.

    Args:
      coordinator: HOST:PORT on which process 0 listens. "": $DISCO_JAX_COORDINATOR; if that is
        unset too, the cluster environment provides all three values (TPU pods, SLURM, Open MPI).
      processes: number of processes; 0: $DISCO_JAX_PROCESSES.
      process: index of this process, from 0; -1: $DISCO_JAX_PROCESS.
      timeout_s: seconds without a heartbeat of some process after which all processes end.

    Raises:
      UserError: only some of the three values are set, other processes do not connect, or no
        cluster environment is detected.
    """
    address = _address(coordinator, processes, process)
    connect_timeout_s = 3 * timeout_s
    timer = threading.Timer(connect_timeout_s, _exit_unconnected, (address, connect_timeout_s))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **address,
            # Longer than the timer, because JAX would end the process with a C++ stack trace.
            initialization_timeout=connect_timeout_s + _SHUTDOWN_S,
            heartbeat_timeout_seconds=timeout_s,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    except (ValueError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"The processes of this run could not connect: {lines[0]} If no cluster environment "
            "is detected, give each process --coordinator=HOST:PORT --processes=N --process=I."
        ) from error
    finally:
        timer.cancel()


def _exit_unconnected(address: Mapping[str, Any], connect_timeout_s: float) -> None:
    """Ends this process with exit code 2 because the other processes did not connect."""
    name = "process {process_id} of {num_processes} at {coordinator_address}".format(
        **{"process_id": "?", "num_processes": "?", "coordinator_address": "?", **address}
    )
    print(
        f"disco-jax: The processes of this run did not find one another: {name} waited for "
        f"{connect_timeout_s:.0f} s (three times --peer_timeout_s). Start all processes, each with "
        "the same --coordinator=HOST:PORT, an address of process 0 that the others can reach, and "
        "its own --process=I.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(UserError.exit_code)


def _address(coordinator: str, processes: int, process: int) -> dict[str, Any]:
    """Returns arguments of `jax.distributed.initialize`; {} leaves them to the cluster."""
    flags = "--coordinator", "--processes", "--process"
    values = [coordinator, str(processes or ""), str(process if process >= 0 else "")]
    values = [
        value or os.environ.get(name, "") for value, name in zip(values, _VARIABLES, strict=True)
    ]
    if not any(values):
        return {}
    missing = [flag for flag, value in zip(flags, values, strict=True) if not value]
    if missing:
        raise UserError(
            f"A run of several processes needs --coordinator, --processes and --process (or "
            f"{', '.join(_VARIABLES)}) for each; missing: {', '.join(missing)}."
        )
    try:
        count, index = int(values[1]), int(values[2])
    except ValueError:
        raise UserError(
            f"--processes={values[1]!r} and --process={values[2]!r} must be integers."
        ) from None
    if not 0 <= index < count:
        raise UserError(f"--process={values[2]} is not one of 0..{count - 1}.")
    if ":" not in values[0]:
        raise UserError(f"--coordinator={values[0]} needs a port, for example {values[0]}:8476.")
    return {"coordinator_address": values[0], "num_processes": count, "process_id": index}


def on_process_zero(action: Callable[[], Result]) -> Result | None:
    """Runs `action` on process 0 while the other processes wait.

    Args:
      action: a function without arguments.

    Returns:
      The output of `action` on process 0; None on the others.

    Raises:
      UserError: on all processes, if `action` raises one.
    """
    if jax.process_count() == 1:
        return action()
    result, message = None, b""
    if jax.process_index() == 0:
        try:
            result = action()
        except UserError as error:
            message = str(error).encode()[:_MAX_MESSAGE_BYTES]
    padded = np.frombuffer(message.ljust(_MAX_MESSAGE_BYTES, b"\0"), np.uint8)
    message = np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes().rstrip(b"\0")
    if message:
        raise UserError(message.decode(errors="replace"))
    return result


def all_gather(values: Any) -> list[Any]:
    """Gathers numbers from all processes.

    Args:
      values: a number or nested lists of numbers, with the same shape on every process.

    Returns:
      [process] -> values, as Python numbers and lists.
    """
    if jax.process_count() == 1:
        return [np.asarray(values).tolist()]
    return multihost_utils.process_allgather(np.asarray(values)).tolist()


def all_gather_rows(local: np.ndarray) -> np.ndarray:
    """Concatenates [N, ...] of every process to [processes * N, ...], in the order of processes.

    The result is temporarily stored on every device.
    """
    return multihost_utils.process_allgather(local, tiled=True)


def exit_all(code: int) -> None:
    """Ends this process after an error, together with the other processes if they fail too.

    Returns if all processes call it within a few seconds, so that each can exit normally.
    Otherwise ends this process at once with exit code `code`. A normal exit would wait for the
    other processes until JAX aborts it with another code. JAX then reports to the other processes
    that this one is lost.
    """
    if _is_single_process():
        return
    with contextlib.suppress(Exception):  # the service runs in process 0, which may have ended
        from jax._src import distributed  # JAX has no public access to the client

        client = distributed.global_state.client
        assert client is not None, "`initialize` creates the client"
        client.key_value_set(f"{_EXIT_KEYS}{jax.process_index()}", str(code))
        end = time.monotonic() + _EXIT_GRACE_S
        while time.monotonic() < end:
            if len(client.key_value_dir_get(_EXIT_KEYS)) == jax.process_count():
                return
            time.sleep(0.1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_single_process() -> bool:
    """Returns whether the run has one process, without initializing a backend, which may fail."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def peer_lost_message(error: Exception) -> str:
    """Returns the user message if an error says that another process was lost, otherwise "".

    A collective of CPUs or GPUs may fail before JAX notices the lost process. JAX then reports it
    and ends this process with SIGABRT; `LOST` is the corresponding exit code.
    """
    if (
        _is_single_process()
        or not isinstance(error, jax.errors.JaxRuntimeError)
        or not _CONNECTION_LOST.search(str(error))
    ):
        return ""
    reason = str(error).splitlines()[0][:200]
    return (
        f"Another process of this run was lost; see its own output for the reason ({reason}). "
        "Start all processes again to resume from the last checkpoint."
    )


class Stop:
    """A flag that SIGTERM, SIGHUP or Ctrl-C sets to stop a loop.

    Attributes:
      interrupted: whether this process received Ctrl-C.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._event = threading.Event()
        self._multi_process = jax.process_count() > 1

    def __call__(self, step: int) -> bool:
        """Returns whether to stop after `step`, the same on all processes.

        Every process must call it after every step.
        """
        if self._multi_process:  # JAX's service handles SIGTERM and makes processes agree on a step
            return multihost_utils.reached_preemption_sync_point(step)
        return self._event.is_set()

    def handle(self, number: int, _: Any) -> None:
        """Handles a signal: sets the flag, and restores the default action of Ctrl-C."""
        if number == signal.SIGINT:
            self.interrupted = True
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            print(
                "disco-jax: stopping after this step; press Ctrl-C again to end at once.",
                file=sys.stderr,
                flush=True,
            )
            if self._multi_process:
                os.kill(os.getpid(), signal.SIGTERM)
        self._event.set()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Handles signals inside the context; yields the flag that they set.

    SIGTERM, SIGHUP (sent when a terminal is closed) and the first Ctrl-C set the flag; the second
    Ctrl-C ends the process at once. Ignored signals stay ignored, such as SIGHUP under `nohup`.
    With several processes, SIGHUP keeps its default action. Outside the main thread no signal is
    handled, because Python delivers signals to the main thread only.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [signal.SIGINT]
    if jax.process_count() == 1:
        numbers += [signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.getsignal(number) for number in numbers}
    handled = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in handled:
        signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number in handled:
            signal.signal(number, before[number])


class Watchdog:
    """Ends the process if no step completes for too long, for example if another process hangs.

    A process that waits inside a collective cannot be interrupted. The watchdog therefore prints
    the stacks of all threads and ends the process without cleanup, with exit code 1. If several
    processes wait, the first one to end may end the others too (`LOST`).
    """

    def __init__(self, timeout_s: float):
        """Creates a watchdog that starts at the first call of `alive`.

        Args:
          timeout_s: 0: never end the process.
        """
        self._timeout_s = timeout_s
        self._beat = threading.Event()
        self._closed = False
        self._step = 0
        self._thread: threading.Thread | None = None

    def alive(self, step: int) -> None:
        """Reports that `step` is complete."""
        self._step = step
        self._beat.set()
        if self._thread is None and self._timeout_s:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stops watching."""
        self._closed = True
        self._beat.set()

    def _watch(self) -> None:
        while not self._closed:
            self._beat.clear()
            if self._beat.wait(self._timeout_s):
                continue
            print(
                f"disco-jax: no progress for {self._timeout_s:.0f} s after step {self._step} "
                "(config.log.hang_s): another process, the storage or the data hangs. Start again "
                "to resume from the last checkpoint.",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(all_threads=True)
            os._exit(1)
