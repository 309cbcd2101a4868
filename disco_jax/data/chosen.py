"""Some records of a split, kept in memory: the labelled few of semi-supervised evaluations."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from disco_jax.data import base
from disco_jax.data.arrays import ArraySource
from disco_jax.data.encoded import EncodedSource, Record

_ANY = 2**31  # unreadable records that are no error


def labels(source: base.Source, split: str) -> np.ndarray:
    """i32[N]: the labels of a split in the stored order; reads every record once."""
    return np.array([label for _, _, label in source.pictures(split)], np.int32)


class ChosenSource:
    """A `base.Source` in which one split holds some of its records and all else is as it was."""

    def __init__(
        self,
        source: base.Source,
        split: str,
        rows: Sequence[int] | np.ndarray,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Reads the split once and keeps what is chosen, encoded as it is stored.

        Args:
          source: where from.
          split: of it.
          rows: places in the stored order, each once.
          process_index: of this host.
          process_count: hosts that share the records.
        """
        self._source, self._split = source, split
        self.name, self.num_classes = source.name, source.num_classes
        self.unreadable, self.skipped = source.unreadable, source.skipped
        self.class_names = source.class_names
        wanted = set(map(int, rows))
        kept = [r for i, r in enumerate(source.pictures(split)) if i in wanted]
        self._few = _few(split, kept, source, process_index, process_count)

    @property
    def splits(self) -> list[str]:
        """The names of the splits."""
        return self._source.splits

    def count(self, split: str) -> int:
        """The number of records of a split, all hosts together."""
        return self._of(split).count(split)

    def fingerprint(self, split: str) -> dict[str, Any]:
        """Returns what tells the images of a split from others; see `base.Source`."""
        return self._of(split).fingerprint(split)

    def pictures(self, split: str) -> Iterator[tuple[str, Any, int]]:
        """Every record of a split; see `base.Source`."""
        return self._of(split).pictures(split)

    def chosen(self, split: str, rows: Sequence[int]) -> Iterator[tuple[str, Any, int]]:
        """Some of them, in any order; see `base.Source`."""
        return self._of(split).chosen(split, rows)

    def part(self, split: str, count: int, seed: int) -> str:
        """A split to draw a sample from; see `base.Source`."""
        return self._of(split).part(split, count, seed)

    def train(
        self,
        split: str,
        views: Mapping[int, Any],
        batch_size: int,
        seed: int,
        start: base.Position,
        max_unreadable: int,
    ) -> base.Batches:
        """Random resized crops of shuffled images, without end; see `base.Source`."""
        return self._of(split).train(split, views, batch_size, seed, start, max_unreadable)

    def evaluate(self, split: str, *args: Any) -> Iterator[dict[str, np.ndarray]]:
        """The middle of every image once, in order; see `base.Source`."""
        return self._of(split).evaluate(split, *args)

    def _of(self, split: str) -> base.Source:
        return self._few if split == self._split else self._source


class _Records(EncodedSource):
    """Encoded pictures of one split."""

    def __init__(
        self, split: str, kept: list[tuple[str, Any, int]], source: base.Source, *hosts: int
    ):
        super().__init__(_ANY, *hosts)
        self.name, self.num_classes = source.name, source.num_classes
        self.unreadable = source.unreadable  # those count together
        self._only, self._kept = split, kept

    @property
    def splits(self) -> list[str]:
        return [self._only]

    def count(self, split: str) -> int:
        return len(self._kept)

    def fingerprint(self, split: str) -> dict[str, Any]:
        names = "\n".join(name for name, _, _ in self._kept)
        return {
            "records": len(self._kept),
            "names (CRC-32)": base.checksum([names.encode(errors="surrogateescape")]),
        }

    def _stored(self, split: str, first: int, last: int) -> Iterable[Record]:
        return self._chosen(split, range(first, last))

    def _shuffled(self, split: str, seed: int, epoch: int, offset: int) -> Iterable[Record]:
        mine = base.shuffled_share(len(self._kept), seed, epoch, self._host, self._hosts)
        return self._chosen(split, mine[offset:].tolist())

    def _chosen(self, split: str, rows: Sequence[int]) -> Iterable[Record]:
        return (self._record(row) for row in rows)

    def _name(self, split: str, row: int) -> str:
        return self._kept[row][0]

    def _record(self, row: int) -> Record:
        _, file, label = self._kept[row]
        return Record(row, file, label)


def _few(split: str, kept: list, source: base.Source, index: int, count: int) -> base.Source:
    if kept and isinstance(kept[0][1], np.ndarray):
        _, images, found = zip(*kept, strict=True)
        return ArraySource(
            {split: (list(images), np.array(found))},
            name=source.name,
            num_classes=source.num_classes,
            process_index=index,
            process_count=count,
        )
    return _Records(split, kept, source, index, count)
