"""Lists in text files: names of pictures, one a line, perhaps with a label behind each."""

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
      file: as it is written, a path or a name.
      label: what follows the first comma or tab, up to the next; "" if nothing does.
    """

    file: str
    label: str


def is_list(path: str) -> bool:
    """Whether a name is that of a list."""
    return path.lower().endswith(SUFFIXES)


def read(path: str, setting: str) -> list[Line]:
    """The lines of a list that are not empty, those of further columns cut off.

    A line is "path", "path,label" (quoted as in CSV if need be) or "path<tab>label". Names that
    are not UTF-8 keep their bytes, as file names do (`surrogateescape`).

    Args:
      path: of the list.
      setting: that names it, for messages.

    Raises:
      UserError: it cannot be read, or is empty.
    """
    file = pathlib.Path(path).expanduser()
    try:
        if not file.is_file():  # a pipe would never end
            raise FileNotFoundError(f"there is no file {file}")
        text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}={path!r} cannot be read as a list of files: {error}") from error
    if "\0" in text:
        raise UserError(f"{setting}={path!r} is no list of files: it is not a text.")
    lines = list(_lines(text))
    if not lines:
        raise UserError(f"{setting}={path!r} holds no file name.")
    return lines


def _lines(text: str) -> Iterator[Line]:
    # Not `splitlines`, which also ends lines at characters that names may hold.
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
    """Whether a comma belongs to the name of a picture."""
    first = line.partition(",")[0].strip()
    return line.strip().lower().endswith(suffixes()) and not first.lower().endswith(suffixes())
