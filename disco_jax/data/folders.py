"""Pictures in files, read from the disk as they are needed, without TensorFlow.

Folders, patterns, lists of files and .tar archives: `scan` says what is in them. Nothing but names
and places is held in memory, any number of pictures will do, and reading on from any place of an
epoch costs nothing: an epoch is a permutation of the names.
"""

import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from disco_jax.data import base, decode, scan
from disco_jax.data.encoded import EncodedSource, Record
from disco_jax.data.skips import printable
from disco_jax.errors import UserError, unknown


class _Split(NamedTuple):
    files: list[str | decode.Part]
    labels: np.ndarray


class FolderSource(EncodedSource):
    """A `base.Source` over the pictures of a folder, a pattern, a list or .tar archives."""

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        name: str = "",
        subset: Mapping[str, Collection[str]] | None = None,
        splits: str = "",
        labels: str = "",
        rules: decode.Rules = decode.USUAL,
        max_unreadable: int = 0,
        max_unreadable_percent: float = 0.0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Lists the names; reads no picture yet.

        Sub-folders train, validation and test, or what else `splits.NAMES` has, are splits;
        without them everything is the split "train". In a split the pictures below each
        sub-folder are a class, numbered in sorted order over all splits; pictures beside them have
        the label -1. Of a pattern such as "photos/**/*.jpg" every match is an unlabelled picture
        of the split "train". A list has one path a line, perhaps with a class. Archives hold
        KEY.jpg and KEY.cls, as WebDataset names them. `skipped` counts whatever else is there.

        Args:
          path: of the folder, list or archive, or a pattern with *, ? or [...].
          name: of the data set, for messages; "": the place's.
          subset: split -> the file names to keep of it, without folders.
          splits: see `config.data.splits`; "": by the names of folders.
          labels: a list with the classes of pictures; "": none.
          rules: how pictures are read.
          max_unreadable, max_unreadable_percent, process_index, process_count: see
            `EncodedSource`.

        Raises:
          UserError: no such place, no picture in it, no plain answer to what its splits are, none
            of a name in `subset`, or labels that do not fit.
        """
        super().__init__(
            max_unreadable,
            process_index,
            process_count,
            max_unreadable_percent=max_unreadable_percent,
            rules=rules,
        )
        place = os.fspath(path)
        found = scan.scan(place, splits, labels)
        as_path = pathlib.Path(place)
        self.name = name or (as_path.stem if as_path.is_file() else as_path.name)
        self._root, self.skipped = found.root, found.skipped
        entries = [entry for some in found.splits.values() for entry in some]
        numbers, self.class_names = number_classes(entries)
        self.num_classes = max(numbers.values(), default=-1) + 1 or None
        self._splits = {}
        for split, some in found.splits.items():
            if subset and split in subset:
                some = _only(some, subset[split], f"the split {split!r} of {self.name}")
            rows = np.array([numbers.get(entry.label, -1) for entry in some], np.int32)
            self._splits[split] = _Split([entry.file for entry in some], rows)

    @property
    def splits(self) -> list[str]:
        """The names of the splits."""
        return list(self._splits)

    def count(self, split: str) -> int:
        """The number of pictures of a split, readable or not, all hosts together."""
        return len(self._split(split).files)

    def fingerprint(self, split: str) -> dict[str, Any]:
        """Returns the number of pictures and a checksum of names and sizes; see `base.Source`."""
        files, _ = self._split(split)
        root = f"{self._root.rstrip(os.sep)}{os.sep}" if self._root else ""
        told = (f"{_without(file, root)}\n" for file in files)
        return {
            "pictures": len(files),
            "names and sizes (CRC-32)": base.checksum(os.fsencode(text) for text in told),
        }

    def _stored(self, split: str, first: int, last: int) -> Iterator[Record]:
        return self._chosen(split, range(first, last))

    def _shuffled(self, split: str, seed: int, epoch: int, offset: int) -> Iterator[Record]:
        mine = base.shuffled_share(self.count(split), seed, epoch, self._host, self._hosts)
        return self._chosen(split, mine[offset:].tolist())

    def _chosen(self, split: str, rows: Sequence[int]) -> Iterator[Record]:
        files, labels = self._split(split)
        return (Record(row, files[row], int(labels[row])) for row in rows)

    def _name(self, split: str, row: int) -> str:
        file = self._split(split).files[row]
        if isinstance(file, decode.Part):
            return printable(file.name)
        return printable(os.path.relpath(file, self._root) if self._root else file)

    def _split(self, split: str) -> _Split:
        if split not in self._splits:
            raise unknown(f"The split of {self.name}", split, self._splits)
        return self._splits[split]


def number_classes(entries: Sequence[scan.Entry]) -> tuple[dict[str, int], list[str]]:
    """Class -> label from 0 up, and the names in the order of the labels.

    Names are sorted. Where lists or archives give whole numbers, these are the labels: of the
    sorted names of folders, if there are any. "-1" is no class.

    Args:
      entries: of all splits.

    Raises:
      UserError: numbers below -1 or too large, or classes of a list that no folder has.
    """
    listed = {e.label for e in entries if e.listed and e.label}
    names = sorted({e.label for e in entries if not e.listed and e.label})
    if not listed or listed <= set(names):
        return {name: number for number, name in enumerate(names)}, names
    if any(not _is_number(label) for label in listed):
        if names and (strange := sorted(listed - set(names))):
            some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise UserError(
                f"A list gives the class {strange[0]!r}, which no folder has; there are "
                f"{len(names)}: {some}. Give names of folders, or their numbers in sorted order."
            )
        names = sorted(listed)
        return {name: number for number, name in enumerate(names)}, names
    most = len(names) or base.MAX_CLASSES
    for label in listed:
        if not -1 <= int(label) < most:
            raise UserError(
                f"A list gives the class {label}; classes are whole numbers from 0 to {most - 1}, "
                "or -1 for none."
            )
    by_number = {label: int(label) for label in listed}
    return {name: number for number, name in enumerate(names)} | by_number, names


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal() and label.isascii()


def _only(entries: list[scan.Entry], names: Collection[str], where: str) -> list[scan.Entry]:
    """Those whose file has one of the names."""
    wanted = frozenset(names)
    found = [entry for entry in entries if os.path.basename(entry.path) in wanted]
    if missing := sorted(wanted - {os.path.basename(entry.path) for entry in found}):
        raise UserError(
            f"{len(missing)} of {len(wanted)} file names of config.data.subset are not in {where}, "
            f"{missing[0]!r} for one."
        )
    return found


def _without(file: str | decode.Part, root: str) -> str:
    """Returns the name of a picture without the folder that the data set lies in, and its size."""
    if isinstance(file, decode.Part):
        return f"{os.path.basename(file.path)}\0{file.offset}\0{file.size}"
    name = file.removeprefix(root) if root else os.path.basename(file)
    try:
        return f"{name}\0{os.stat(file).st_size}"
    except OSError:  # it cannot be asked, nor read
        return name
