"""Several processes of one run: how they meet, agree, and notice that one of them is gone."""

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

# Longest message that process 0 tells the others, in bytes.
_MESSAGE = 4096
# Seconds that a process waits for the others when it ends.
_FAREWELL_S = 60
# Exit code of a process that ends because another one is gone: 128 + SIGABRT, which JAX sends.
LOST = 134
_GONE = re.compile(r"gloo|nccl|connection (reset|closed|refused)|socket closed", re.IGNORECASE)
# Seconds that a process that failed waits for the others to fail too.
_PATIENCE_S = 5.0
_LEFT = "disco_jax/left/"
_ONE_OF_MANY = "DISCO_JAX_COORDINATOR", "DISCO_JAX_PROCESSES", "DISCO_JAX_PROCESS"


def meet(
    coordinator: str = "", processes: int = 0, process: int = -1, timeout_s: int = 100
) -> None:
    """Joins the other processes of the run; before anything else asks for devices.

    Args:
      coordinator: HOST:PORT that process 0 listens on. "": $DISCO_JAX_COORDINATOR; if that is not
        set either, the cluster tells all three (TPU pods, SLURM and Open MPI do).
      processes: how many there are; 0: $DISCO_JAX_PROCESSES.
      process: which this one is, from 0; -1: $DISCO_JAX_PROCESS.
      timeout_s: a process that gives no sign of life for so long ends the run on all.

    Raises:
      UserError: only some of the three are known, the others do not come, or no cluster is found.
    """
    known = _place(coordinator, processes, process)
    patience_s = 3 * timeout_s
    timer = threading.Timer(patience_s, _give_up, (known, patience_s))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **known,
            # Longer than the timer: JAX ends the process with a stack trace of C++.
            initialization_timeout=patience_s + _FAREWELL_S,
            heartbeat_timeout_seconds=timeout_s,
            shutdown_timeout_seconds=_FAREWELL_S,
        )
    except (ValueError, RuntimeError) as error:
        words = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"The processes of this run did not find one another: {words[0]} Where no cluster "
            "tells, give --coordinator=HOST:PORT --processes=N --process=I to each."
        ) from error
    finally:
        timer.cancel()


def _give_up(known: Mapping[str, Any], patience_s: float) -> None:
    """Ends the process, which waits for others that do not come, with exit code 2."""
    me = "process {process_id} of {num_processes} at {coordinator_address}".format(
        **{"process_id": "?", "num_processes": "?", "coordinator_address": "?", **known}
    )
    print(
        f"disco-jax: The processes of this run did not find one another: {me} waited for "
        f"{patience_s:.0f} s (three times --peer_timeout_s). Start all of them, each with the same "
        "--coordinator=HOST:PORT, an address of process 0 that the others can reach, and its own "
        "--process=I.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(UserError.exit_code)


def _place(coordinator: str, processes: int, process: int) -> dict[str, Any]:
    """What `jax.distributed` is told; {} leaves all to the cluster."""
    given = [coordinator, str(processes or ""), str(process if process >= 0 else "")]
    given = [
        value or os.environ.get(name, "") for value, name in zip(given, _ONE_OF_MANY, strict=True)
    ]
    if not any(given):
        return {}
    flags = "--coordinator", "--processes", "--process"
    missing = [flag for flag, value in zip(flags, given, strict=True) if not value]
    if missing:
        raise UserError(
            f"Of several processes each needs --coordinator, --processes and --process (or "
            f"{', '.join(_ONE_OF_MANY)}); missing: {', '.join(missing)}."
        )
    try:
        count, mine = int(given[1]), int(given[2])
    except ValueError:
        raise UserError(
            f"--processes={given[1]!r} and --process={given[2]!r} must be whole numbers."
        ) from None
    if not 0 <= mine < count:
        raise UserError(f"--process={given[2]} is not one of 0..{count - 1}.")
    if ":" not in given[0]:
        raise UserError(f"--coordinator={given[0]} needs a port: {given[0]}:8476.")
    return {"coordinator_address": given[0], "num_processes": count, "process_id": mine}


def first(action: Callable[[], Result]) -> Result | None:
    """Runs `action` on process 0 while the others wait; its UserError is raised on all of them.

    Returns:
      What `action` returns, on process 0; None on the others.
    """
    if jax.process_count() == 1:
        return action()
    result, message = None, b""
    if jax.process_index() == 0:
        try:
            result = action()
        except UserError as error:
            message = str(error).encode()[:_MESSAGE]
    told = np.frombuffer(message.ljust(_MESSAGE, b"\0"), np.uint8)
    message = np.asarray(multihost_utils.broadcast_one_to_all(told)).tobytes().rstrip(b"\0")
    if message:
        raise UserError(message.decode(errors="replace"))
    return result


def everyone(values: Any) -> list[Any]:
    """`values`, a tree of numbers of equal shape on each process, of every process in order."""
    if jax.process_count() == 1:
        return [np.asarray(values).tolist()]
    return multihost_utils.process_allgather(np.asarray(values)).tolist()


def rows(mine: np.ndarray) -> np.ndarray:
    """[N, ...] of each process, N equal -> [processes * N, ...] of all, in their order.

    The result is for a moment on every device.
    """
    return multihost_utils.process_allgather(mine, tiled=True)


def leave(code: int) -> None:
    """To be called by a process that ends with an error: the others may know nothing of it.

    Returns when they all end likewise, so that they end together. Otherwise this process ends here
    and now, with `code`: an orderly end would wait for all, and be cut off by JAX with another
    code. The others then learn from JAX that this one is gone.
    """
    if _alone():
        return
    with contextlib.suppress(Exception):  # the service is that of process 0, which may be gone
        from jax._src import distributed  # JAX has no public way to it

        client = distributed.global_state.client
        assert client is not None, "`meet` has made one"
        client.key_value_set(f"{_LEFT}{jax.process_index()}", str(code))
        end = time.monotonic() + _PATIENCE_S
        while time.monotonic() < end:
            if len(client.key_value_dir_get(_LEFT)) == jax.process_count():
                return
            time.sleep(0.1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _alone() -> bool:
    """Whether there is one process; asks no backend, which may be what fails."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def lost(error: Exception) -> str:
    """What to tell of an error that says that another process is gone; "" if it says otherwise.

    A collective of CPUs or GPUs may notice it before JAX does, which then says so and ends this
    process with the signal SIGABRT: `LOST` is the exit code of that.
    """
    if (
        _alone()
        or not isinstance(error, jax.errors.JaxRuntimeError)
        or not _GONE.search(str(error))
    ):
        return ""
    words = str(error).splitlines()[0][:200]
    return (
        f"Another process of this run was lost; its own output says why ({words}). Start all again "
        "to go on from the last checkpoint."
    )


class Stop:
    """Whether somebody asked a loop to stop, by SIGTERM, SIGHUP or Ctrl-C.

    Attributes:
      interrupted: whether it was Ctrl-C, to this process.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._event = threading.Event()
        self._many = jax.process_count() > 1

    def __call__(self, step: int) -> bool:
        """Whether to stop after `step`; each process must ask after every step.

        All processes get the same answer at the same step.
        """
        if self._many:  # the processes' own service hears SIGTERM and agrees on a step
            return multihost_utils.reached_preemption_sync_point(step)
        return self._event.is_set()

    def hear(self, number: int, _: Any) -> None:
        """The handler of a signal."""
        if number == signal.SIGINT:
            self.interrupted = True
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            print(
                "disco-jax: stopping after this step; Ctrl-C again ends at once.",
                file=sys.stderr,
                flush=True,
            )
            if self._many:
                os.kill(os.getpid(), signal.SIGTERM)
        self._event.set()


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Stop]:
    """Hears signals for as long as the context lasts, and yields what tells of them.

    SIGTERM, SIGHUP (which comes when a terminal is closed) and the first Ctrl-C ask to stop; the
    second Ctrl-C ends the process at once. What is ignored, as SIGHUP under `nohup`, stays so. Of
    several processes SIGHUP is not heard. Only the main thread of a process hears signals.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [signal.SIGINT]
    if jax.process_count() == 1:
        numbers += [signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.getsignal(number) for number in numbers}
    heard = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in heard:
        signal.signal(number, stop.hear)
    try:
        yield stop
    finally:
        for number in heard:
            signal.signal(number, before[number])


class Watchdog:
    """Ends the process when nothing has happened for too long, as when another process hangs.

    A process that waits for another inside a collective cannot be interrupted, so this is the
    one place that ends without cleaning up: exit code 1, after every thread's stack was printed.
    Where several processes wait, the first to end may take the others with it (`LOST`).
    """

    def __init__(self, timeout_s: float):
        """Begins to watch with the first `alive`.

        Args:
          timeout_s: 0 never ends anything.
        """
        self._timeout_s = timeout_s
        self._beat = threading.Event()
        self._closed = False
        self._step = 0
        self._thread: threading.Thread | None = None

    def alive(self, step: int) -> None:
        """Tells that `step` is done."""
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
                f"disco-jax: nothing has happened for {self._timeout_s:.0f} s after step "
                f"{self._step} (config.log.hang_s): another process, the storage or the data "
                "hangs. Start again to go on from the last checkpoint.",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(all_threads=True)
            os._exit(1)
