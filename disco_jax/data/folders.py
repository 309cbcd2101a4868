"""Pictures in a folder, read from the disk as they are needed, without TensorFlow.

Nothing but file names is held in memory, any number of pictures will do, and reading on from any
place of an epoch costs nothing: an epoch is a permutation of the names.
"""

import glob
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from disco_jax.data import base
from disco_jax.data.encoded import EncodedSource, Record
from disco_jax.errors import UserError, unknown

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_SPLIT_FOLDERS = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "test": "test",
}


class _Split(NamedTuple):
    files: list[str]
    labels: np.ndarray


class FolderSource(EncodedSource):
    """A `base.Source` over the JPEG, PNG, WebP and BMP pictures of a folder or a pattern."""

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        name: str = "",
        subset: Mapping[str, Collection[str]] | None = None,
        max_unreadable: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Lists the names; reads no picture yet.

        Sub-folders train, validation (or val) and test are splits; without them everything is
        the split "train". In a split the pictures below each sub-folder are a class, numbered
        in sorted order over all splits; pictures beside them have the label -1. Names that begin
        with a dot are passed over, what is not named as a picture is ignored. Of a pattern such
        as "photos/**/*.jpg" every match is an unlabelled picture of the split "train".

        Args:
          path: of the folder, or a pattern with *, ? or [...].
          name: of the data set, for messages; "": the folder's.
          subset: split -> the file names to keep of it, without folders.
          max_unreadable: how many pictures may be skipped because they cannot be decoded.
          process_index: of this host.
          process_count: hosts that share the records.

        Raises:
          UserError: no such folder, no picture in it, or none of a name in `subset`.
        """
        self._root = pathlib.Path(path)
        listed = _matches(str(path)) if glob.has_magic(str(path)) else _list_folder(self._root)
        classes = sorted({label for _, label, _ in listed if label})
        numbers = {label: number for number, label in enumerate(classes)}
        self.name = name or self._root.name
        self.num_classes = len(classes) or None
        super().__init__(max_unreadable, process_index, process_count)
        self._splits = {}
        for split in dict.fromkeys(split for split, _, _ in listed):
            mine = [(label, file) for s, label, file in listed if s == split]
            if subset and split in subset:
                mine = _only(mine, subset[split], f"the split {split!r} of {self.name}")
            labels = np.array([numbers.get(label, -1) for label, _ in mine], np.int32)
            self._splits[split] = _Split([file for _, file in mine], labels)

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
        begin = len(str(self._root)) + 1 if self._root.is_dir() else 0
        told = (
            f"{file[begin:] if begin else os.path.basename(file)}\0{_size(file)}\n"
            for file in files
        )
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
        return os.path.relpath(file, self._root) if self._root.is_dir() else file

    def _split(self, split: str) -> _Split:
        if split not in self._splits:
            raise unknown(f"The split of {self.name}", split, self._splits)
        return self._splits[split]


def pictures(root: pathlib.Path) -> list[tuple[str, str]]:
    """Sorted (first sub-folder or "", file) below a folder; follows links, but not in circles."""
    found, seen = [], set()
    for folder, inside, names in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in seen:
            inside.clear()
            continue
        seen.add(os.path.realpath(folder))
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        parts = pathlib.Path(folder).relative_to(root).parts
        for name in names:
            if _is_picture(name):
                found.append((parts[0] if parts else "", os.path.join(folder, name)))
    return sorted(found)


def _only(listed: list[tuple[str, str]], names: Collection[str], where: str):
    """Those (class, file) whose file has one of the names."""
    names, found = frozenset(names), [pair for pair in listed if _basename(pair) in names]
    if missing := sorted(names - {_basename(pair) for pair in found}):
        raise UserError(
            f"{len(missing)} of {len(names)} file names of config.data.subset are not in {where}, "
            f"{missing[0]!r} for one."
        )
    return found


def _size(file: str) -> int:
    """Returns the bytes of a file; -1 where it cannot be asked."""
    try:
        return os.stat(file).st_size
    except OSError:
        return -1


def _basename(pair: tuple[str, str]) -> str:
    return os.path.basename(pair[1])


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _matches(pattern: str) -> list[tuple[str, str, str]]:
    """Sorted (split, "", file) of every picture that a pattern matches."""
    found = sorted(f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f))
    files = [("train", "", f) for f in found if _is_picture(os.path.basename(f))]
    if not files:
        raise UserError(f"{pattern} matches no pictures (names that end in {', '.join(SUFFIXES)}).")
    return files


def _list_folder(path: pathlib.Path) -> list[tuple[str, str, str]]:
    """Sorted (split, class or "", file) of every picture below a folder."""
    if not path.is_dir():
        raise UserError(f"There is no folder {path}; config.data.dir names the one to read.")
    inside = sorted(child for child in path.iterdir() if child.is_dir())
    splits = [child for child in inside if child.name in _SPLIT_FOLDERS]
    if {"val", "validation"} <= {child.name for child in splits}:
        raise UserError(f"{path} has both val and validation; keep one of them.")
    roots = [(_SPLIT_FOLDERS[child.name], child) for child in splits] or [("train", path)]
    files = [(split, *found) for split, root in roots for found in pictures(root)]
    if not files:
        raise UserError(f"{path} has no pictures (names that end in {', '.join(SUFFIXES)}).")
    return files
