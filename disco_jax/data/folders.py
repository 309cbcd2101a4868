"""Pictures in a folder, read from the disk as they are needed, without TensorFlow.

Nothing but file names is held in memory, any number of pictures will do, and reading on from any
place of an epoch costs nothing: an epoch is a permutation of the names.
"""

import collections
import contextlib
import glob
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from disco_jax.data import base
from disco_jax.data.arrays import FILTERS, check_crops, evaluated
from disco_jax.data.crops import boxes, uniforms
from disco_jax.errors import UserError, unknown

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_SPLIT_FOLDERS = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "test": "test",
}
_THREADS = min(16, os.cpu_count() or 1)
_AHEAD = 2  # batches whose pictures are being decoded
# A JPEG's transform can be undone at 1/2, 1/4 or 1/8 of the size for a fraction of the work.
_SHRINKS = (8, 4, 2)
_ORIENTATION = 0x0112  # of EXIF; 1 is upright


class Unreadable(Exception):
    """A picture that cannot be decoded."""


class _Split(NamedTuple):
    files: list[str]
    labels: np.ndarray


class FolderSource:
    """A `base.Source` over the JPEG, PNG, WebP and BMP pictures of a folder or a pattern."""

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        name: str = "",
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
          max_unreadable: how many pictures may be skipped because they cannot be decoded.
          process_index: of this host.
          process_count: hosts that share the records.

        Raises:
          UserError: no such folder, or no picture in it.
        """
        self._root = pathlib.Path(path)
        listed = _matches(str(path)) if glob.has_magic(str(path)) else _list_folder(self._root)
        classes = sorted({label for _, label, _ in listed if label})
        numbers = {label: number for number, label in enumerate(classes)}
        self.name = name or self._root.name
        self.num_classes = len(classes) or None
        self.unreadable: list[str] = []
        self._limit = max_unreadable
        self._host, self._hosts = process_index, process_count
        self._splits = {}
        for split in dict.fromkeys(split for split, _, _ in listed):
            mine = [(label, file) for s, label, file in listed if s == split]
            labels = np.array([numbers.get(label, -1) for label, _ in mine], np.int32)
            self._splits[split] = _Split([file for _, file in mine], labels)

    @property
    def splits(self) -> list[str]:
        """The names of the splits."""
        return list(self._splits)

    def count(self, split: str) -> int:
        """The number of pictures of a split, readable or not, all hosts together."""
        return len(self._split(split).files)

    def pictures(self, split: str) -> Iterator[tuple[str, str, int]]:
        """(name in the folder, file, label or -1) of every picture, in the stored order."""
        found = self._split(split)
        for file, label in zip(found.files, found.labels, strict=True):
            yield self._name(file), file, int(label)

    def train(
        self,
        split: str,
        views: Mapping[int, Any],
        batch_size: int,
        seed: int,
        start: base.Position,
        max_unreadable: int,
    ) -> Iterator[base.HostBatch]:
        """Random resized crops of shuffled images, without end; see `base.Source`."""
        check_crops(views)
        files = self._split(split).files
        share = len(files) // self._hosts
        base.check_batch_size(self.name, split, share, batch_size)
        return self._train(split, share, views, batch_size, seed, start, max_unreadable)

    def _train(self, split, share, views, batch_size, seed, start, limit):
        files, offset = self._split(split).files, start.offset
        with _pool() as submit:
            for epoch in itertools.count(start.epoch):
                shuffled = np.random.default_rng(base.seed_words(seed, epoch))
                order = shuffled.permutation(len(files))[self._host :: self._hosts]
                where = (seed, epoch, self._host)

                def crops(position, order=order, where=where):
                    return crops_of(files[order[position]], views, where, position)

                made = _in_order(submit, crops, range(offset, share), _AHEAD * batch_size)
                any_batch = offset > 0
                for places, rows in self._batches(made, files, order, batch_size, limit):
                    any_batch = True
                    after = base.next_position(epoch, places[-1] + 1, share, batch_size)
                    columns = zip(*rows, strict=True)
                    cut = {v: np.stack(c) for v, c in zip(views, columns, strict=True)}
                    yield base.HostBatch(cut, {}, after)
                if not any_batch:  # too much is unreadable to fill one batch
                    base.check_batch_size(self.name, split, 0, batch_size)
                offset = 0

    def _batches(self, made, files, order, batch_size, limit):
        """(positions, crops) of each batch that is full; names what cannot be read."""
        places, rows = [], []
        for position, found in made:
            if isinstance(found, Unreadable):
                self._skip(files[order[position]], found, limit)
                continue
            places.append(position)
            rows.append(found)
            if len(rows) == batch_size:
                yield places, rows
                places, rows = [], []

    def evaluate(
        self,
        split: str,
        size: int,
        resize: int,
        interpolation: str,
        batch_size: int,
        limit: int = 0,
    ) -> Iterator[dict[str, np.ndarray]]:
        """The middle of every image once, in order; see `base.Source`."""
        base.check_evaluation(size, resize)
        if interpolation not in FILTERS:
            raise unknown("config.augment.interpolation", interpolation, FILTERS)
        return self._evaluate(self._split(split), size, resize, interpolation, batch_size, limit)

    def _evaluate(self, split, size, resize, interpolation, batch_size, limit):
        count = len(split.files)
        first = self._host * count // self._hosts
        share = (self._host + 1) * count // self._hosts - first
        last = first + base.share_of_limit(limit, share, self._host, self._hosts)
        batches = base.evaluation_batches(count, limit, batch_size, self._hosts)

        def one(index):
            return evaluated(decode(split.files[index]), size, resize, interpolation)

        with _pool() as submit:
            made = _in_order(submit, one, range(first, last), _AHEAD * batch_size)
            for begin in range(first, first + batches * batch_size, batch_size):
                images, labels = [np.zeros((0, size, size, 3), np.uint8)], []
                for index, found in itertools.islice(made, max(min(batch_size, last - begin), 0)):
                    if isinstance(found, Unreadable):
                        self._skip(split.files[index], found, self._limit)
                    else:
                        images.append(found[None])
                        labels.append(split.labels[index])
                whole = np.concatenate(images)
                yield base.padded(whole, np.array(labels, np.int32), batch_size)

    def _skip(self, file: str, error: Exception, limit: int) -> None:
        reason = str(error).replace(repr(file), "it")
        base.report_unreadable(
            self.name, self.unreadable, [f"{self._name(file)} ({reason})"], limit
        )

    def _name(self, file: str) -> str:
        return os.path.relpath(file, self._root) if self._root.is_dir() else file

    def _split(self, split: str) -> _Split:
        if split not in self._splits:
            raise unknown(f"The split of {self.name}", split, self._splits)
        return self._splits[split]


def crops_of(
    file: str | os.PathLike, views: Mapping[int, Any], where: Sequence[int], position: int
) -> list[np.ndarray]:
    """One u8[S, S, 3] a view: random resized crops of one picture.

    A JPEG several times larger than its crops is decoded at 1/2, 1/4 or 1/8 of its size, never
    below what the crops need; otherwise the bytes are torchvision's for the same boxes.

    Args:
      file: the picture.
      views: view -> its crop, an object with the fields of `views.Crop`.
      where: (seed, epoch, host), what the boxes are drawn from besides view and position.
      position: of the picture in this host's epoch.

    Raises:
      Unreadable: it cannot be decoded.
    """

    def drawn(view: int, crop: Any, width: int, height: int) -> np.ndarray:
        draws = uniforms(*where, view, position, 1)
        sides = np.array([height]), np.array([width])
        return boxes(draws, *sides, crop.scale, crop.ratio)[0]

    with _reading(), Image.open(file) as opened:
        upright = opened.getexif().get(_ORIENTATION, 1) == 1
        picture = opened if upright else ImageOps.exif_transpose(opened)
        width, height = picture.size
    places = {view: drawn(view, crop, width, height) for view, crop in views.items()}
    with _reading(), Image.open(file) as opened:
        if upright and opened.format == "JPEG" and opened.mode in ("RGB", "L"):
            opened.draft(None, _smallest(places, views, width, height))
        picture = rgb(opened if upright else picture)
    shrunk = (picture.width / width, picture.height / height)
    return [_cut(picture, places[view], shrunk, crop) for view, crop in views.items()]


def decode(file: str | os.PathLike | BinaryIO) -> np.ndarray:
    """One picture, from a path or an open file, as u8[H, W, 3].

    It is turned as its EXIF orientation says and becomes RGB of 8 bits: transparency is laid over
    white, as viewers show it, and 16 bits keep their upper half.

    Raises:
      Unreadable: it cannot be decoded.
    """
    with _reading(), Image.open(file) as opened:
        return np.asarray(rgb(ImageOps.exif_transpose(opened)))


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


def rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode as RGB of 8 bits; see `decode`."""
    if picture.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would clip at 255
        grey = np.clip(np.asarray(picture), 0, 65_535) >> 8
        picture = Image.fromarray(grey.astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """What goes wrong inside is the file's fault: Pillow raises a dozen kinds of exceptions."""
    try:
        yield
    except Exception as error:
        raise Unreadable(str(error) or type(error).__name__) from error


def _smallest(places, views, width, height):
    """The size in px to decode a JPEG at: no crop gets fewer pixels than it has to show."""
    room = min(min(places[view][2:]) / crop.size for view, crop in views.items())
    factor = next((f for f in _SHRINKS if f <= room), 1)
    return (-(-width // factor), -(-height // factor))


def _cut(picture: Image.Image, place, shrunk, crop) -> np.ndarray:
    """The box (top, left, height, width) of the whole picture, u8[S, S, 3]."""
    top, left, height, width = (int(n) for n in place)
    side = (crop.size, crop.size)
    if shrunk == (1.0, 1.0):
        # Cut first, as torchvision does: a filter then sees nothing outside the box.
        part = picture.crop((left, top, left + width, top + height))
        return np.asarray(part.resize(side, FILTERS[crop.interpolation]))
    x, y = shrunk
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    return np.asarray(picture.resize(side, FILTERS[crop.interpolation], box=box))


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


@contextlib.contextmanager
def _pool() -> Iterator[Any]:
    """A function that runs another in a thread: (function, argument) -> Future."""
    pool = ThreadPoolExecutor(_THREADS)
    try:
        yield pool.submit
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(submit: Any, function: Any, items: Sequence[int], ahead: int) -> Iterator[tuple]:
    """(item, its result, or `Unreadable`) in the order of `items`, `ahead` of them under way."""
    waiting: collections.deque[tuple[int, Future]] = collections.deque()
    rest = iter(items)

    def fill() -> None:
        for item in itertools.islice(rest, ahead - len(waiting)):
            waiting.append((item, submit(function, item)))

    fill()
    while waiting:
        item, future = waiting.popleft()
        fill()
        error = future.exception()
        yield item, error if isinstance(error, Unreadable) else future.result()
