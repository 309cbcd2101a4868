"""Standard output and error of a command that goes on when nobody reads them any more.

A pipe ends when its reader does: `disco-jax list | head -1`, or the terminal of a long training.
The work is worth more than the words, and what counts of them stands in files, so the words are
dropped and the command goes on to its end and its own exit code.
"""

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer

# What a system answers where a pipe has no reader, or a terminal was closed.
_NOBODY = errno.EPIPE, errno.EIO


def protect() -> None:
    """Makes the standard streams of this process such that a lost reader is no error."""
    _fill_gaps()
    sys.stdout.flush()
    sys.stdout, sys.stderr = _protected(1, sys.stdout), _protected(2, sys.stderr)


def _fill_gaps() -> None:
    """Opens what the process was started without (`2>&-`), or the next file would be taken for it.

    Python has no stream where it found none.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            stream = io.FileIO(number, "w" if number else "r", closefd=False)
            buffered = io.BufferedWriter(stream) if number else io.BufferedReader(stream)
            setattr(sys, name, io.TextIOWrapper(buffered, encoding="utf-8"))


class _Forgiving(io.FileIO):
    """Writes to where its number leads, and to nowhere once nobody reads there."""

    def __init__(self, number: int):
        super().__init__(number, "w", closefd=False)
        # Nothing is left to tell of an error of standard error.
        self._any_error = number == 2

    def write(self, data: "Buffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _NOBODY and not self._any_error:
                raise
        # The number itself: libraries in C and child processes write to it, too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return memoryview(data).nbytes


def _protected(number: int, stream: TextIO) -> io.TextIOWrapper:
    lines = stream.line_buffering if isinstance(stream, io.TextIOWrapper) else True
    return io.TextIOWrapper(
        io.BufferedWriter(_Forgiving(number)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=lines,
    )
