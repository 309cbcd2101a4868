"""Records of skipped data: files that are not used, and images that cannot be decoded."""

import collections
import contextlib
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from disco_jax.files import whole

_NAMES_PER_REASON = 5
_REASONS_SHOWN = 12


class Skipped:
    """Counts of skipped files by reason, with the first few names for each reason."""

    def __init__(self) -> None:
        """Starts with no skipped files."""
        self.counts: collections.Counter[str] = collections.Counter()
        self.names: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, reason: str, name: str) -> None:
        """Counts a skipped file or folder.

        Args:
          reason: reason for skipping it, phrased to follow a number, e.g. "with suffix .txt".
          name: name of the file, or of the folder with a trailing "/".
        """
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < _NAMES_PER_REASON:
            names.append(printable(name))

    def lines(self) -> list[str]:
        """Returns a line per reason, most frequent first: "2 with suffix .txt: a.txt, b.txt"."""
        lines = []
        for reason, count in self.counts.most_common(_REASONS_SHOWN):
            more = ", ..." if count > _NAMES_PER_REASON else ""
            lines.append(f"{count:,} {reason}: {', '.join(self.names[reason])}{more}")
        if rest := self.counts.total() - sum(n for _, n in self.counts.most_common(len(lines))):
            lines.append(f"{rest:,} for {len(self.counts) - len(lines)} other reasons")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Returns reason -> {"count", "names"}, with the first few names."""
        return {
            reason: {"count": count, "names": self.names[reason]}
            for reason, count in self.counts.most_common()
        }


class UnreadableNames(list[str]):
    """Names of records that could not be decoded, optionally stored in a file across restarts."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        """Starts with some names; no file is written before `keep_in` is called."""
        super().__init__(names)
        self._file: epath.Path | None = None

    def keep_in(self, file: epath.PathLike) -> None:
        """Loads the names stored in a file, if it exists, and stores every new name in it.

        Args:
          file: path of the file, with one JSON string per line; damaged lines are ignored.
        """
        self._file = epath.Path(file)
        text = self._file.read_bytes().decode("utf-8", "replace") if self._file.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                name = json.loads(line)
                if isinstance(name, str) and name not in self:
                    super().append(name)

    def append(self, name: str) -> None:
        """Appends a name and updates the file, if there is one."""
        super().append(name)
        if self._file is not None:
            with whole(self._file) as file:
                file.write_text("".join(json.dumps(stored) + "\n" for stored in self))

    @property
    def file(self) -> str:
        """Path of the file with the names; "" if there is none."""
        return str(self._file or "")


def utf8(name: str) -> str:
    """Escapes the bytes of a file name that are not UTF-8, e.g. "caf\\xe9.jpg"."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def printable(name: str) -> str:
    """Escapes non-UTF-8 bytes and control characters, so that any terminal can print the name."""
    text = utf8(name)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
