"""The base class of sources of encoded images: threaded decoding and cropping, in order.

A subclass defines the records of a split and their order in an epoch. This class decodes them,
crops them and builds batches; it reports and skips records that cannot be decoded.
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

from disco_jax.data import contract, decode
from disco_jax.data.skips import Skipped, UnreadableNames
from disco_jax.errors import unknown

_THREADS = os.cpu_count() or 1
_BATCHES_AHEAD = 2  # batches decoded in advance
_CHUNK = 16  # images per task of a thread; their boxes are drawn together


class Record(NamedTuple):
    """One encoded image of a split.

    Attributes:
      row: index in the stored order of the split.
      file: encoded bytes of the image, or their location.
      label: class of the image, -1 if it has none.
    """

    row: int
    file: decode.File
    label: int


class EncodedSource(abc.ABC):
    """A `contract.Source` whose records are encoded images."""

    name: str
    num_classes: int | None

    def __init__(
        self,
        max_unreadable: int,
        process_index: int,
        process_count: int,
        *,
        max_unreadable_percent: float = 0.0,
        rules: decode.Rules = decode.DEFAULT_RULES,
    ):
        """Initializes the state shared by all storage formats.

        Args:
          max_unreadable: number of records `evaluate` may skip for any size of a split.
          process_index: index of this host.
          process_count: number of hosts that share the records.
          max_unreadable_percent: percentage of this host's records of a split it may skip.
          rules: settings for decoding images.
        """
        self.unreadable = UnreadableNames()
        self.skipped = Skipped()
        self.class_names: Sequence[str] = ()
        self._least, self._percent, self._rules = max_unreadable, max_unreadable_percent, rules
        self._host, self._hosts = process_index, process_count

    @property
    @abc.abstractmethod
    def splits(self) -> list[str]:
        """Names of the splits."""

    @abc.abstractmethod
    def count(self, split: str) -> int:
        """Returns the number of records of a split over all hosts, readable or not."""

    @abc.abstractmethod
    def fingerprint(self, split: str) -> dict[str, Any]:
        """Returns a fingerprint of the images of a split; see `contract.Source`."""

    @abc.abstractmethod
    def _stored(self, split: str, first: int, last: int) -> Iterable[Record]:
        """Returns the records first..last - 1 in the stored order, the same on every host."""

    @abc.abstractmethod
    def _selected(self, split: str, rows: Sequence[int]) -> Iterable[Record]:
        """Returns the records of `rows` in that order.

        Raises UserError immediately if the split does not support random access.
        """

    @abc.abstractmethod
    def _shuffled(self, split: str, seed: int, epoch: int, offset: int) -> Iterable[Record]:
        """Returns this host's count // hosts records of an epoch, starting at `offset`."""

    @abc.abstractmethod
    def _name(self, split: str, row: int) -> str:
        """Returns the name of a record for messages."""

    def iter_images(self, split: str) -> Iterator[tuple[str, decode.File, int]]:
        """Yields (name, encoded image, label or -1) of every record in the stored order."""
        return self._items(split, self._stored(split, 0, self.count(split)))

    def take(self, split: str, rows: Sequence[int]) -> Iterator[tuple[str, decode.File, int]]:
        """Yields selected records like `iter_images`, in the order of `rows`."""
        return self._items(split, self._selected(split, rows))

    def part(self, split: str, count: int, seed: int) -> str:
        """Returns `split`, whose labels are in memory."""
        return split

    def _items(
        self, split: str, records: Iterable[Record]
    ) -> Iterator[tuple[str, decode.File, int]]:
        """Yields (name, file with decoding rules, label) of records."""
        return (
            (self._name(split, r.row), decode.ruled(r.file, self._rules), r.label) for r in records
        )

    def train(
        self,
        split: str,
        views: Mapping[int, Any],
        batch_size: int,
        seed: int,
        start: contract.Position,
        max_unreadable: int,
    ) -> contract.Batches:
        """Yields batches of random resized crops of shuffled images; see `contract.Source`."""
        check_crops(views)
        share = self.count(split) // self._hosts
        contract.check_batch_size(self.name, split, share, batch_size)
        return self._train(split, share, views, batch_size, seed, start, max_unreadable)

    def _train(self, split, share, views, batch_size, seed, start, limit):
        offset = start.offset
        with _pool() as submit:
            for epoch in itertools.count(start.epoch):
                seeds = (seed, epoch, self._host)

                def crops(chunk, seeds=seeds):
                    first, records = chunk
                    files = [decode.ruled(r.file, self._rules) for r in records]
                    return decode.crops_of(files, views, seeds, first)

                records = self._shuffled(split, seed, epoch, offset)
                chunks = _chunks(offset, records, min(_CHUNK, batch_size))
                chunk_crops = _in_order(submit, crops, chunks, _chunks_ahead(batch_size))
                any_batch = offset > 0
                for end, batch_crops, records in self._batches(
                    split, chunk_crops, batch_size, limit
                ):
                    any_batch = True
                    columns = zip(*batch_crops, strict=True)
                    stacked = {
                        view: np.stack(column) for view, column in zip(views, columns, strict=True)
                    }
                    position = contract.next_position(epoch, end, share, batch_size)
                    labels = np.array([record.label for record in records], np.int32)
                    rows = np.array([record.row for record in records], np.int64)
                    yield contract.HostBatch(stacked, {}, position, labels, rows)
                if not any_batch:  # too few readable records to fill a batch
                    contract.check_batch_size(self.name, split, 0, batch_size)
                offset = 0

    def _batches(self, split, chunk_crops, batch_size, limit):
        """Yields (offset after the batch, crops, records) of each full batch.

        Reports and skips unreadable records.
        """
        batch_crops, batch_records = [], []
        for (first, records), crops in chunk_crops:
            for position, record, crop in zip(itertools.count(first), records, crops, strict=False):
                if isinstance(crop, decode.Unreadable):
                    self._skip(split, record, crop, limit)
                    continue
                batch_crops.append(crop)
                batch_records.append(record)
                if len(batch_crops) == batch_size:
                    yield position + 1, batch_crops, batch_records
                    batch_crops, batch_records = [], []

    def evaluate(
        self,
        split: str,
        size: int,
        resize: int,
        interpolation: str,
        batch_size: int,
        limit: int = 0,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields the center crop of every image once, in order; see `contract.Source`."""
        contract.check_evaluation(size, resize)
        if interpolation not in decode.FILTERS:
            raise unknown("config.augment.interpolation", interpolation, decode.FILTERS)
        self.count(split)
        return self._evaluate(split, (size, resize, interpolation), batch_size, limit)

    def _evaluate(self, split, options, batch_size, limit):
        count = self.count(split)
        first = self._host * count // self._hosts
        share = (self._host + 1) * count // self._hosts - first
        last = first + contract.share_of_limit(limit, share, self._host, self._hosts)
        batches = contract.evaluation_batches(count, limit, batch_size, self._hosts)

        def center_crops(chunk):
            return [_center_crop(decode.ruled(r.file, self._rules), options) for r in chunk[1]]

        with _pool() as submit:
            chunks = _chunks(first, self._stored(split, first, last), _CHUNK)
            items = self._readable_of(
                split, _in_order(submit, center_crops, chunks, _chunks_ahead(batch_size))
            )
            for start in range(first, first + batches * batch_size, batch_size):
                rows = max(min(batch_size, last - start), 0)
                readable = [pair for pair in itertools.islice(items, rows) if pair is not None]
                images = np.zeros((len(readable), options[0], options[0], 3), np.uint8)
                for i, (image, _) in enumerate(readable):
                    images[i] = image
                labels = np.array([label for _, label in readable], np.int32)
                yield contract.padded(images, labels, batch_size)

    def _readable_of(self, split, chunk_images):
        """Yields (image, label) of each record, or None if it cannot be decoded."""
        share = self.count(split) // self._hosts
        limit = contract.unreadable_limit(share, self._least, self._percent)
        for (_, records), images in chunk_images:
            for record, image in zip(records, images, strict=True):
                if isinstance(image, decode.Unreadable):
                    self._skip(split, record, image, limit)
                    yield None
                else:
                    yield image, record.label

    def _skip(self, split: str, record: Record, error: Exception, limit: int) -> None:
        name = f"{self._name(split, record.row)} ({error})"
        contract.report_unreadable(self.name, self.unreadable, [name], limit)


def check_crops(views: Mapping[int, Any]) -> None:
    """Raises UserError if a crop has an unknown interpolation."""
    for crop in views.values():
        if crop.interpolation not in decode.FILTERS:
            raise unknown("config.augment.interpolation", crop.interpolation, decode.FILTERS)


def _center_crop(file: decode.File, options: tuple) -> np.ndarray | decode.Unreadable:
    try:
        return decode.evaluated(decode.decode(file), *options)
    except decode.Unreadable as error:
        return error


def _chunks_ahead(batch_size: int) -> int:
    """Returns the number of chunks to decode in advance: enough for all threads and batches."""
    return max(_BATCHES_AHEAD * -(-batch_size // min(_CHUNK, batch_size)), 2 * _THREADS)


def _chunks(first: int, records: Iterable[Record], size: int) -> Iterator[tuple[int, list[Record]]]:
    """Yields (position of the first record, up to `size` records) until the records end."""
    records = iter(records)
    while chunk := list(itertools.islice(records, size)):
        yield first, chunk
        first += len(chunk)


@contextlib.contextmanager
def _pool() -> Iterator[Callable[..., Future]]:
    """Yields the `submit` method of a thread pool: (function, argument) -> Future."""
    pool = ThreadPoolExecutor(_THREADS)
    try:
        yield pool.submit
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(submit: Any, function: Any, items: Iterable[Any], ahead: int) -> Iterator[tuple]:
    """Yields (item, function(item)) in the order of `items`, with `ahead` items in flight."""
    pending: collections.deque[tuple[Any, Future]] = collections.deque()
    remaining = iter(items)

    def fill() -> None:
        for item in itertools.islice(remaining, ahead - len(pending)):
            pending.append((item, submit(function, item)))

    fill()
    while pending:
        item, future = pending.popleft()
        fill()
        yield item, future.result()
