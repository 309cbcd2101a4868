"""Subsets of a split held in memory, e.g. the labelled images of semi-supervised evaluations."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from disco_jax.data import contract
from disco_jax.data.arrays import ArraySource
from disco_jax.data.encoded import EncodedSource, Record

_UNLIMITED = 2**31  # any number of unreadable records is tolerated


def read_labels(source: contract.Source, split: str) -> np.ndarray:
    """Returns i32[N], the labels of a split in the stored order; reads every record once."""
    return np.array([label for _, _, label in source.iter_images(split)], np.int32)


class SubsetSource:
    """A `contract.Source` that restricts one split to selected records, and no other split."""

    def __init__(
        self,
        source: contract.Source,
        split: str,
        rows: Sequence[int] | np.ndarray,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Reads the split once and keeps the selected records in memory, encoded as stored.

        Args:
          source: source of the records.
          split: name of the split to restrict.
          rows: indices in the stored order, each at most once.
          process_index: index of this host.
          process_count: number of hosts that share the records.
        """
        self._source, self._split = source, split
        self.name, self.num_classes = source.name, source.num_classes
        self.unreadable, self.skipped = source.unreadable, source.skipped
        self.class_names = source.class_names
        selected = set(map(int, rows))
        records = [r for i, r in enumerate(source.iter_images(split)) if i in selected]
        self._few = _few(split, records, source, process_index, process_count)

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return self._source.splits

    def count(self, split: str) -> int:
        """Returns the number of records of a split over all hosts."""
        return self._of(split).count(split)

    def fingerprint(self, split: str) -> dict[str, Any]:
        """Returns a fingerprint of the images of a split; see `contract.Source`."""
        return self._of(split).fingerprint(split)

    def iter_images(self, split: str) -> Iterator[tuple[str, Any, int]]:
        """Yields every record of a split; see `contract.Source`."""
        return self._of(split).iter_images(split)

    def take(self, split: str, rows: Sequence[int]) -> Iterator[tuple[str, Any, int]]:
        """Yields selected records of a split in the order of `rows`; see `contract.Source`."""
        return self._of(split).take(split, rows)

    def part(self, split: str, count: int, seed: int) -> str:
        """Returns the split to sample from; see `contract.Source`."""
        return self._of(split).part(split, count, seed)

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
        return self._of(split).train(split, views, batch_size, seed, start, max_unreadable)

    def evaluate(self, split: str, *args: Any) -> Iterator[dict[str, np.ndarray]]:
        """Yields the center crop of every image once, in order; see `contract.Source`."""
        return self._of(split).evaluate(split, *args)

    def _of(self, split: str) -> contract.Source:
        return self._few if split == self._split else self._source


class _Records(EncodedSource):
    """Encoded images of one split held in memory."""

    def __init__(
        self, split: str, records: list[tuple[str, Any, int]], source: contract.Source, *hosts: int
    ):
        super().__init__(_UNLIMITED, *hosts)
        self.name, self.num_classes = source.name, source.num_classes
        self.unreadable = source.unreadable  # shared, so that the two are counted together
        self._only, self._selected_records = split, records

    @property
    def splits(self) -> list[str]:
        return [self._only]

    def count(self, split: str) -> int:
        return len(self._selected_records)

    def fingerprint(self, split: str) -> dict[str, Any]:
        names = "\n".join(name for name, _, _ in self._selected_records)
        return {
            "records": len(self._selected_records),
            "names (CRC-32)": contract.checksum([names.encode(errors="surrogateescape")]),
        }

    def _stored(self, split: str, first: int, last: int) -> Iterable[Record]:
        return self._selected(split, range(first, last))

    def _shuffled(self, split: str, seed: int, epoch: int, offset: int) -> Iterable[Record]:
        share = contract.shuffled_share(
            len(self._selected_records), seed, epoch, self._host, self._hosts
        )
        return self._selected(split, share[offset:].tolist())

    def _selected(self, split: str, rows: Sequence[int]) -> Iterable[Record]:
        return (self._record(row) for row in rows)

    def _name(self, split: str, row: int) -> str:
        return self._selected_records[row][0]

    def _record(self, row: int) -> Record:
        _, file, label = self._selected_records[row]
        return Record(row, file, label)


def _few(
    split: str, records: list, source: contract.Source, index: int, count: int
) -> contract.Source:
    if records and isinstance(records[0][1], np.ndarray):
        _, images, labels = zip(*records, strict=True)
        return ArraySource(
            {split: (list(images), np.array(labels))},
            name=source.name,
            num_classes=source.num_classes,
            process_index=index,
            process_count=count,
        )
    return _Records(split, records, source, index, count)
