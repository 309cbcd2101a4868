"""What sources of encoded pictures share: crops and evaluations made by threads, in order.

A subclass says which records a split has and in which order an epoch reads them; here they are
decoded, cut and put into batches, and those that cannot be decoded are named and passed over.
"""

import abc
import collections
import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from disco_jax.data import base, decode
from disco_jax.data.skips import Skipped, UnreadableNames
from disco_jax.errors import unknown

_THREADS = os.cpu_count() or 1
_AHEAD = 2  # batches whose pictures are being decoded
_CHUNK = 16  # pictures that a thread takes at a time: their boxes are drawn together


class Record(NamedTuple):
    """One picture of a split.

    Attributes:
      row: its place in the stored order of the split.
      file: what the picture's file holds, or where it lies.
      label: -1 where there is none.
    """

    row: int
    file: decode.File
    label: int


class EncodedSource(abc.ABC):
    """A `base.Source` over records that hold a picture's file each."""

    name: str
    num_classes: int | None

    def __init__(
        self,
        max_unreadable: int,
        process_index: int,
        process_count: int,
        *,
        max_unreadable_percent: float = 0.0,
        rules: decode.Rules = decode.USUAL,
    ):
        """The part of a source that does not depend on where records are kept.

        Args:
          max_unreadable: how many records `evaluate` may skip, whatever the size of a split.
          process_index: of this host.
          process_count: hosts that share the records.
          max_unreadable_percent: how many it may skip, of this host's records of a split.
          rules: how pictures are read.
        """
        self.unreadable = UnreadableNames()
        self.skipped = Skipped()
        self.class_names: Sequence[str] = ()
        self._least, self._percent, self._rules = max_unreadable, max_unreadable_percent, rules
        self._host, self._hosts = process_index, process_count

    @property
    @abc.abstractmethod
    def splits(self) -> list[str]:
        """The names of the splits."""

    @abc.abstractmethod
    def count(self, split: str) -> int:
        """The number of records of a split, readable or not, all hosts together."""

    @abc.abstractmethod
    def fingerprint(self, split: str) -> dict[str, Any]:
        """Returns what tells the images of a split from others; see `base.Source`."""

    @abc.abstractmethod
    def _stored(self, split: str, first: int, last: int) -> Iterable[Record]:
        """The records from `first` to before `last`, in the stored order, whatever the host."""

    @abc.abstractmethod
    def _chosen(self, split: str, rows: Sequence[int]) -> Iterable[Record]:
        """The records of any rows in their order; refuses at once what cannot be read so."""

    @abc.abstractmethod
    def _shuffled(self, split: str, seed: int, epoch: int, offset: int) -> Iterable[Record]:
        """This host's count // hosts records of an epoch, from the one at `offset` on."""

    @abc.abstractmethod
    def _name(self, split: str, row: int) -> str:
        """What a person would look for to find a record."""

    def pictures(self, split: str) -> Iterator[tuple[str, decode.File, int]]:
        """(name, encoded image or file, label or -1) of every record, in the stored order."""
        return self._shown(split, self._stored(split, 0, self.count(split)))

    def chosen(self, split: str, rows: Sequence[int]) -> Iterator[tuple[str, decode.File, int]]:
        """The same of some records, in any order; see `base.Source`."""
        return self._shown(split, self._chosen(split, rows))

    def part(self, split: str, count: int, seed: int) -> str:
        """The split itself: its labels are in memory."""
        return split

    def _shown(
        self, split: str, records: Iterable[Record]
    ) -> Iterator[tuple[str, decode.File, int]]:
        return (
            (self._name(split, r.row), decode.ruled(r.file, self._rules), r.label) for r in records
        )

    def train(
        self,
        split: str,
        views: Mapping[int, Any],
        batch_size: int,
        seed: int,
        start: base.Position,
        max_unreadable: int,
    ) -> base.Batches:
        """Random resized crops of shuffled pictures, without end; see `base.Source`."""
        check_crops(views)
        share = self.count(split) // self._hosts
        base.check_batch_size(self.name, split, share, batch_size)
        return self._train(split, share, views, batch_size, seed, start, max_unreadable)

    def _train(self, split, share, views, batch_size, seed, start, limit):
        offset = start.offset
        with _pool() as submit:
            for epoch in itertools.count(start.epoch):
                where = (seed, epoch, self._host)

                def crops(chunk, where=where):
                    place, records = chunk
                    files = [decode.ruled(r.file, self._rules) for r in records]
                    return decode.crops_of(files, views, where, place)

                records = self._shuffled(split, seed, epoch, offset)
                chunks = _chunks(offset, records, min(_CHUNK, batch_size))
                made = _in_order(submit, crops, chunks, _ahead(batch_size))
                any_batch = offset > 0
                for after, crops_of, records in self._batches(split, made, batch_size, limit):
                    any_batch = True
                    columns = zip(*crops_of, strict=True)
                    cut = {view: np.stack(c) for view, c in zip(views, columns, strict=True)}
                    after = base.next_position(epoch, after, share, batch_size)
                    labels = np.array([record.label for record in records], np.int32)
                    rows = np.array([record.row for record in records], np.int64)
                    yield base.HostBatch(cut, {}, after, labels, rows)
                if not any_batch:  # too much is unreadable to fill one batch
                    base.check_batch_size(self.name, split, 0, batch_size)
                offset = 0

    def _batches(self, split, made, batch_size, limit):
        """(position after it, crops, records) of each full batch; names what cannot be read."""
        crops, read = [], []
        for (place, records), found in made:
            for position, record, cut in zip(itertools.count(place), records, found, strict=False):
                if isinstance(cut, decode.Unreadable):
                    self._skip(split, record, cut, limit)
                    continue
                crops.append(cut)
                read.append(record)
                if len(crops) == batch_size:
                    yield position + 1, crops, read
                    crops, read = [], []

    def evaluate(
        self,
        split: str,
        size: int,
        resize: int,
        interpolation: str,
        batch_size: int,
        limit: int = 0,
    ) -> Iterator[dict[str, np.ndarray]]:
        """The middle of every picture once, in order; see `base.Source`."""
        base.check_evaluation(size, resize)
        if interpolation not in decode.FILTERS:
            raise unknown("config.augment.interpolation", interpolation, decode.FILTERS)
        self.count(split)
        return self._evaluate(split, (size, resize, interpolation), batch_size, limit)

    def _evaluate(self, split, how, batch_size, limit):
        count = self.count(split)
        first = self._host * count // self._hosts
        share = (self._host + 1) * count // self._hosts - first
        last = first + base.share_of_limit(limit, share, self._host, self._hosts)
        batches = base.evaluation_batches(count, limit, batch_size, self._hosts)

        def middles(chunk):
            return [_middle(decode.ruled(r.file, self._rules), how) for r in chunk[1]]

        with _pool() as submit:
            chunks = _chunks(first, self._stored(split, first, last), _CHUNK)
            made = self._readable_of(split, _in_order(submit, middles, chunks, _ahead(batch_size)))
            for begin in range(first, first + batches * batch_size, batch_size):
                rows = max(min(batch_size, last - begin), 0)
                found = [pair for pair in itertools.islice(made, rows) if pair is not None]
                images = np.zeros((len(found), how[0], how[0], 3), np.uint8)
                for i, (image, _) in enumerate(found):
                    images[i] = image
                labels = np.array([label for _, label in found], np.int32)
                yield base.padded(images, labels, batch_size)

    def _readable_of(self, split, made):
        """(image, label) of each record in turn, None of those that cannot be decoded."""
        share = self.count(split) // self._hosts
        limit = base.unreadable_limit(share, self._least, self._percent)
        for (_, records), found in made:
            for record, image in zip(records, found, strict=True):
                if isinstance(image, decode.Unreadable):
                    self._skip(split, record, image, limit)
                    yield None
                else:
                    yield image, record.label

    def _skip(self, split: str, record: Record, error: Exception, limit: int) -> None:
        name = f"{self._name(split, record.row)} ({error})"
        base.report_unreadable(self.name, self.unreadable, [name], limit)


def check_crops(views: Mapping[int, Any]) -> None:
    """Raises UserError for a crop that cannot be made."""
    for crop in views.values():
        if crop.interpolation not in decode.FILTERS:
            raise unknown("config.augment.interpolation", crop.interpolation, decode.FILTERS)


def _middle(file: decode.File, how: tuple) -> np.ndarray | decode.Unreadable:
    try:
        return decode.evaluated(decode.decode(file), *how)
    except decode.Unreadable as error:
        return error


def _ahead(batch_size: int) -> int:
    """Chunks under way: enough for every thread and for whole batches."""
    return max(_AHEAD * -(-batch_size // min(_CHUNK, batch_size)), 2 * _THREADS)


def _chunks(place: int, records: Iterable[Record], size: int) -> Iterator[tuple[int, list[Record]]]:
    """(place of the first, up to `size` records) until there are no more."""
    records = iter(records)
    while chunk := list(itertools.islice(records, size)):
        yield place, chunk
        place += len(chunk)


@contextlib.contextmanager
def _pool() -> Iterator[Callable[..., Future]]:
    """A function that runs another in a thread: (function, argument) -> Future."""
    pool = ThreadPoolExecutor(_THREADS)
    try:
        yield pool.submit
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(submit: Any, function: Any, items: Iterable[Any], ahead: int) -> Iterator[tuple]:
    """(item, its result) in the order of `items`, `ahead` of them under way."""
    waiting: collections.deque[tuple[Any, Future]] = collections.deque()
    rest = iter(items)

    def fill() -> None:
        for item in itertools.islice(rest, ahead - len(waiting)):
            waiting.append((item, submit(function, item)))

    fill()
    while waiting:
        item, future = waiting.popleft()
        fill()
        yield item, future.result()
