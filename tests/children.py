"""Starts child processes that have imported the package already, which saves seconds in each.

A child is a fork of one process that has imported the modules of `PRELOADED` and done nothing else:
it has no device and a single thread. The child has its own environment, standard streams and
arguments, calls a function, and ends as any Python program does. `tests/test_console.py` starts
programs that import everything themselves.
"""

import atexit
import functools
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

TESTS = pathlib.Path(__file__).parent
FOLDERS = TESTS, TESTS / "parity", *(TESTS / name for name in ("evaluate", "run", "train"))
PRELOADED = (
    "helpers",
    "disco_jax.workflows.pretrain",
    "disco_jax.commands.knn",
    "disco_jax.commands.linear",
)


class Child:
    """A started process, with the parts of the interface of `subprocess.Popen` that tests use."""

    def __init__(self, pid, folder):
        self.pid, self._folder = pid, folder
        self.returncode = None

    def poll(self):
        """Returns the exit code, negative for a signal, or None while the process runs."""
        ended = self._folder / "ended"
        if self.returncode is None and ended.exists():
            self.returncode = int(ended.read_text())
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout):
        """Returns (standard output and error, None) at the end of the process."""
        latest = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > latest:
                os.kill(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(str(self.pid), timeout, self._output())
            time.sleep(0.05)
        return self._output(), None

    def _output(self):
        return (self._folder / "output").read_text(errors="replace")


def start(function, *words, cwd=".", **variables):
    """Starts a child that calls "module:function" in `cwd` with `words` as its arguments.

    Its environment is this process's with `variables`; None removes one.
    """
    environment = {**os.environ, **variables}
    folder = pathlib.Path(tempfile.mkdtemp(dir=_folder().name))
    request = {
        "function": function,
        "words": [str(word) for word in words],
        "environment": {name: x for name, x in environment.items() if x is not None},
        "folder": str(folder),
        "cwd": str(pathlib.Path(cwd).absolute()),
    }
    parent = _parent()
    parent.stdin.write(json.dumps(request) + "\n")
    parent.stdin.flush()
    return Child(int(parent.stdout.readline()), folder)


@functools.cache
def _folder():
    return tempfile.TemporaryDirectory(prefix="children-")


@functools.cache
def _parent():
    """Starts the process whose forks the children are; it ends with this process."""
    path = os.pathsep.join([*map(str, FOLDERS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    parent = subprocess.Popen(
        [sys.executable, __file__],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    atexit.register(_stop, parent)
    return parent


def _stop(parent):
    parent.stdin.close()
    parent.wait()
    _folder().cleanup()


def serve():
    """Starts a child for each request of standard input; returns the request in the child."""
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("helpers").digits()  # imports scikit-learn
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps intermediate forks
    while line := sys.stdin.readline():
        if not os.fork():
            request = json.loads(line)
            if _wait_for_child(request):
                os._exit(0)
            return request
    return None


def _wait_for_child(request):
    """Forks once more; returns True in the parent, after it has recorded the exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    folder = pathlib.Path(request["folder"])
    output = os.open(folder / "output", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        (folder / "code").write_text(str(code))
        (folder / "code").rename(folder / "ended")
        return True
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [request["function"], *request["words"]]
    return False


def main():
    request = serve()
    if request:
        module, _, function = request["function"].partition(":")
        getattr(importlib.import_module(module), function)()


if __name__ == "__main__":
    main()
