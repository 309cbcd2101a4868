"""Text files that list images, one per line, optionally followed by a label."""

import csv
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from disco_jax.data.decode import suffixes
from disco_jax.errors import UserError

SUFFIXES = (".csv", ".list", ".lst", ".tsv", ".txt")


class Line(NamedTuple):
    """A line of a list.

    Attributes:
      file: path or name as written in the list.
      label: text between the first and the second comma or tab; "" if there is none.
    """

    file: str
    label: str


def is_list(path: str) -> bool:
    """Returns whether a path has a suffix of a list."""
    return path.lower().endswith(SUFFIXES)


def read(path: str, setting: str) -> list[Line]:
    """Reads the lines of a list that are not empty; ignores columns after the label.

    A line is "path", "path,label" (with CSV quoting if needed) or "path<tab>label". Bytes of names
    that are not UTF-8 are preserved, as in file names (`surrogateescape`).

    Args:
      path: path of the list.
      setting: name of the setting that holds the path, for messages.

    Raises:
      UserError: the list cannot be read or is empty.
    """
    file = pathlib.Path(path).expanduser()
    try:
        if not file.is_file():  # reading a pipe could block forever
            raise FileNotFoundError(f"there is no file {file}")
        text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}={path!r} cannot be read as a list of files: {error}") from error
    if "\0" in text:
        raise UserError(f"{setting}={path!r} is not a list of files: it is not a text file.")
    lines = list(_lines(text))
    if not lines:
        raise UserError(f"{setting}={path!r} has no file names.")
    return lines


def _lines(text: str) -> Iterator[Line]:
    # `splitlines` would also split at characters that file names may contain.
    for line in text.replace("\r\n", "\n").split("\n"):
        if not line.strip():
            continue
        if "\t" in line:
            file, label, *_ = line.split("\t")
        elif "," in line and not _is_one_name(line):
            file, label, *_ = [*next(csv.reader([line])), ""]
        else:
            file, label = line, ""
        yield Line(file.strip(), label.strip())


def _is_one_name(line: str) -> bool:
    """Returns whether the comma in a line is part of an image's file name."""
    first = line.partition(",")[0].strip()
    return line.strip().lower().endswith(suffixes()) and not first.lower().endswith(suffixes())
