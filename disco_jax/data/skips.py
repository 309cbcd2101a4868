"""What a data set leaves out, counted and named: files that are not used, damaged records."""

import collections
import contextlib
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from disco_jax.files import whole

_NAMES_KEPT = 5  # of what is left out, for each reason
_REASONS_SHOWN = 12


class Skipped:
    """What a place holds beside the records of a data set: how much, why, and the first names."""

    def __init__(self) -> None:
        """Empty."""
        self.counts: collections.Counter[str] = collections.Counter()
        self.names: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, reason: str, name: str) -> None:
        """Counts a file or folder.

        Args:
          reason: why it is left out, as it reads after a number: "with suffix .txt".
          name: of it; a folder's ends in "/".
        """
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < _NAMES_KEPT:
            names.append(printable(name))

    def lines(self) -> list[str]:
        """One line a reason, the most frequent first: "3 with suffix .txt: a.txt, b.txt, c.txt"."""
        made = []
        for reason, count in self.counts.most_common(_REASONS_SHOWN):
            more = ", ..." if count > _NAMES_KEPT else ""
            made.append(f"{count:,} {reason}: {', '.join(self.names[reason])}{more}")
        if rest := self.counts.total() - sum(n for _, n in self.counts.most_common(len(made))):
            made.append(f"{rest:,} for {len(self.counts) - len(made)} other reasons")
        return made

    def as_dict(self) -> dict[str, Any]:
        """Reason -> {"count", "names"}, the names being the first few."""
        return {
            reason: {"count": count, "names": self.names[reason]}
            for reason, count in self.counts.most_common()
        }


class UnreadableNames(list[str]):
    """The names of the records that could not be decoded, kept in a file over restarts."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        """Holds some names already; no file is written before `keep_in`."""
        super().__init__(names)
        self._file: epath.Path | None = None

    def keep_in(self, file: epath.PathLike) -> None:
        """Adds the names in a file, if it is there, and writes every new one to it.

        Args:
          file: a JSON string a line; a line that is damaged is passed over.
        """
        self._file = epath.Path(file)
        text = self._file.read_bytes().decode("utf-8", "replace") if self._file.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                name = json.loads(line)
                if isinstance(name, str) and name not in self:
                    super().append(name)

    def append(self, name: str) -> None:
        """Adds a name."""
        super().append(name)
        if self._file is not None:
            with whole(self._file) as file:
                file.write_text("".join(json.dumps(one) + "\n" for one in self))

    @property
    def file(self) -> str:
        """Where the names are kept; "": nowhere."""
        return str(self._file or "")


def utf8(name: str) -> str:
    """A name of a file whose bytes that are not UTF-8 are escapes, as in "caf\\xe9.jpg"."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def printable(name: str) -> str:
    """A name that any terminal takes: as `utf8`, with control characters as escapes too."""
    text = utf8(name)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
