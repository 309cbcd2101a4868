"""Standard output and error that survive a closed pipe or terminal.

A pipe breaks when its reader exits, e.g. `disco-jax list | head -1`, and so does the output of a
training whose terminal was closed. All important output is also written to files, so further
output is discarded and the command continues to its end and its own exit code.
"""

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Error numbers of a write to a pipe without reader, or to a closed terminal.
_NO_READER = errno.EPIPE, errno.EIO


def protect() -> None:
    """Replaces stdout and stderr by streams that discard output after their reader is gone."""
    _fill_gaps()
    sys.stdout.flush()
    sys.stdout, sys.stderr = _protected(1, sys.stdout), _protected(2, sys.stderr)


def _fill_gaps() -> None:
    """Opens /dev/null for standard streams that were closed at the start (`2>&-`).

    Otherwise the next file that is opened would get the stream's descriptor. Python sets
    `sys.stderr` etc. to None for streams that were closed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, i.e. `number`
        if getattr(sys, name) is None:
            stream = io.FileIO(number, "w" if number else "r", closefd=False)
            buffered = io.BufferedWriter(stream) if number else io.BufferedReader(stream)
            setattr(sys, name, io.TextIOWrapper(buffered, encoding="utf-8"))


class _Forgiving(io.FileIO):
    """File that writes to a descriptor, and to /dev/null once the descriptor has no reader."""

    def __init__(self, number: int):
        super().__init__(number, "w", closefd=False)
        # Errors of stderr cannot be reported anywhere, so all of them are ignored.
        self._any_error = number == 2

    def write(self, data: "Buffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _NO_READER and not self._any_error:
                raise
        # Redirects the descriptor itself, since C libraries and child processes write to it too.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        return memoryview(data).nbytes


def _protected(number: int, stream: TextIO) -> io.TextIOWrapper:
    lines = stream.line_buffering if isinstance(stream, io.TextIOWrapper) else True
    return io.TextIOWrapper(
        io.BufferedWriter(_Forgiving(number)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=lines,
    )
