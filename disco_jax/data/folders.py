"""Images in files, read from disk on demand, without TensorFlow.

Sources are folders, patterns, lists of files and .tar archives; `scan` lists their contents. Only
names and locations are held in memory, so the number of images is not limited. An epoch is a
permutation of the names, so resuming within one costs nothing.
"""

import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from disco_jax.data import contract, decode, scan
from disco_jax.data.encoded import EncodedSource, Record
from disco_jax.data.skips import printable
from disco_jax.errors import UserError, unknown


class _Split(NamedTuple):
    files: list[str | decode.Part]
    labels: np.ndarray


class FolderSource(EncodedSource):
    """A `contract.Source` over the images of a folder, a pattern, a list or .tar archives."""

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        name: str = "",
        subset: Mapping[str, Collection[str]] | None = None,
        splits: str = "",
        labels: str = "",
        rules: decode.Rules = decode.DEFAULT_RULES,
        max_unreadable: int = 0,
        max_unreadable_percent: float = 0.0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Lists the file names without reading any image.

        Subfolders named train, validation and test, or another name in `splits.NAMES`, are splits;
        without them everything belongs to the split "train". Within a split, each subfolder is a
        class; classes are numbered in sorted order over all splits, and images outside the
        subfolders have the label -1. Every match of a pattern such as "photos/**/*.jpg" is an
        unlabelled image of the split "train". A list has one path per line, optionally with a
        class. Archives hold KEY.jpg and KEY.cls as in WebDataset. `skipped` counts all other files.

        Args:
          path: path of the folder, list or archive, or a pattern with *, ? or [...].
          name: name of the data set for messages; "" takes it from `path`.
          subset: split -> names of the files to keep, without folders.
          splits: see `config.data.splits`; "" recognises them by folder names.
          labels: path of a list with the classes of images; "" for none.
          rules: settings for decoding images.
          max_unreadable, max_unreadable_percent, process_index, process_count: see
            `EncodedSource`.

        Raises:
          UserError: the location does not exist or has no image, its splits are ambiguous, a name
            in `subset` is missing, or the labels do not fit.
        """
        super().__init__(
            max_unreadable,
            process_index,
            process_count,
            max_unreadable_percent=max_unreadable_percent,
            rules=rules,
        )
        location = os.fspath(path)
        contents = scan.scan(location, splits, labels)
        as_path = pathlib.Path(location)
        self.name = name or (as_path.stem if as_path.is_file() else as_path.name)
        self._root, self.skipped = contents.root, contents.skipped
        all_entries = [entry for entries in contents.splits.values() for entry in entries]
        numbers, self.class_names = number_classes(all_entries)
        self.num_classes = max(numbers.values(), default=-1) + 1 or None
        self._splits = {}
        for split, entries in contents.splits.items():
            if subset and split in subset:
                entries = _filter_by_name(
                    entries, subset[split], f"the split {split!r} of {self.name}"
                )
            row_labels = np.array([numbers.get(entry.label, -1) for entry in entries], np.int32)
            self._splits[split] = _Split([entry.file for entry in entries], row_labels)

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return list(self._splits)

    def count(self, split: str) -> int:
        """Returns the number of images of a split over all hosts, readable or not."""
        return len(self._split(split).files)

    def fingerprint(self, split: str) -> dict[str, Any]:
        """Returns the number of images and a checksum of names and sizes; see `contract.Source`."""
        files, _ = self._split(split)
        root = f"{self._root.rstrip(os.sep)}{os.sep}" if self._root else ""
        lines = (f"{_relative_name_and_size(file, root)}\n" for file in files)
        return {
            "pictures": len(files),
            "names and sizes (CRC-32)": contract.checksum(os.fsencode(text) for text in lines),
        }

    def _stored(self, split: str, first: int, last: int) -> Iterator[Record]:
        return self._selected(split, range(first, last))

    def _shuffled(self, split: str, seed: int, epoch: int, offset: int) -> Iterator[Record]:
        share = contract.shuffled_share(self.count(split), seed, epoch, self._host, self._hosts)
        return self._selected(split, share[offset:].tolist())

    def _selected(self, split: str, rows: Sequence[int]) -> Iterator[Record]:
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
    """Returns class -> label (from 0), and the class names in label order.

    Names are sorted. If all classes in lists or archives are integers, they are used as labels; if
    there are class folders too, the integers index the sorted folder names. "-1" means unlabelled.

    Args:
      entries: images of all splits.

    Raises:
      UserError: a number is below -1 or too large, or a list has a class that is not a folder.
    """
    listed = {e.label for e in entries if e.listed and e.label}
    names = sorted({e.label for e in entries if not e.listed and e.label})
    if not listed or listed <= set(names):
        return {name: number for number, name in enumerate(names)}, names
    if any(not _is_number(label) for label in listed):
        if names and (unknown_classes := sorted(listed - set(names))):
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise UserError(
                f"A list gives the class {unknown_classes[0]!r}, which is not a folder; there are "
                f"{len(names)}: {shown}. Use folder names, or their indices in sorted order."
            )
        names = sorted(listed)
        return {name: number for number, name in enumerate(names)}, names
    limit = len(names) or contract.MAX_CLASSES
    for label in listed:
        if not -1 <= int(label) < limit:
            raise UserError(
                f"A list gives the class {label}; classes must be integers from 0 to {limit - 1}, "
                "or -1 for unlabelled images."
            )
    by_number = {label: int(label) for label in listed}
    return {name: number for number, name in enumerate(names)} | by_number, names


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal() and label.isascii()


def _filter_by_name(
    entries: list[scan.Entry], names: Collection[str], where: str
) -> list[scan.Entry]:
    """Returns the entries whose file name is in `names`; raises UserError if one is missing."""
    required = frozenset(names)
    selected = [entry for entry in entries if os.path.basename(entry.path) in required]
    if missing := sorted(required - {os.path.basename(entry.path) for entry in selected}):
        raise UserError(
            f"{len(missing)} of {len(required)} file names of config.data.subset are not in "
            f"{where}, e.g. {missing[0]!r}."
        )
    return selected


def _relative_name_and_size(file: str | decode.Part, root: str) -> str:
    """Returns the name of an image relative to the data set's folder, and its size."""
    if isinstance(file, decode.Part):
        return f"{os.path.basename(file.path)}\0{file.offset}\0{file.size}"
    name = file.removeprefix(root) if root else os.path.basename(file)
    try:
        return f"{name}\0{os.stat(file).st_size}"
    except OSError:  # the file has become unreadable
        return name
