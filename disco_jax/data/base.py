"""The contract of a data source: positions, host batches, and who reads which records.

An epoch is a fresh shuffle of this host's share of a split and a pure function of (seed, epoch,
host). Batches never span epochs and an epoch's remainder is dropped, so a `Position` is all that
a run has to save in order to read on as if it had never stopped.
"""

import dataclasses
import functools
import logging
import math
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from disco_jax.data.skips import Skipped, UnreadableNames, printable
from disco_jax.errors import UserError

_LOG = logging.getLogger(__name__)
_NAMES_SHOWN = 10  # of the unreadable records, in an error
MAX_CLASSES = 2**24  # labels from there on are taken for a mistake


@dataclasses.dataclass(frozen=True)
class Position:
    """How far into the shuffled order of an epoch this host has read.

    Attributes:
      epoch: counts from 0.
      offset: records of this host's shuffled order that are used up, unreadable ones included.
    """

    epoch: int
    offset: int

    @classmethod
    def start(cls) -> "Position":
        """The first record of the first epoch."""
        return cls(0, 0)


class HostBatch(NamedTuple):
    """What a host reads for one step.

    Attributes:
      views: view -> u8[b, S, S, 3], its crop of each image.
      aux: name -> array[b, ...] or a tree of them, what else a method reads; {} where nothing is.
      position: where the next batch starts.
      labels: i32[b], -1 where there is none; for probes alone, no method reads them.
      rows: i64[b], the place of each image in the stored order of its split, of all hosts.
    """

    views: dict[int, np.ndarray]
    aux: dict[str, Any]
    position: Position
    labels: np.ndarray
    rows: np.ndarray


# Without end; whoever reads no further closes them.
Batches = Generator[HostBatch, None, None]


class Source(Protocol):
    """Where images come from; arrays, folders and TFDS have one each.

    Attributes:
      name: of the data set.
      num_classes: how many labels there are; None where nothing is labelled.
      class_names: of the labels, in their order; () where they are numbers alone.
      skipped: what lies in the place of the data set and is not used.
      unreadable: the names of the records skipped so far because they could not be decoded.
    """

    name: str
    num_classes: int | None
    class_names: Sequence[str]
    skipped: Skipped
    unreadable: UnreadableNames

    @property
    def splits(self) -> list[str]:
        """The names of the splits."""

    def count(self, split: str) -> int:
        """The number of records of a split, all hosts together."""

    def fingerprint(self, split: str) -> dict[str, Any]:
        """Returns what tells the images of a split from others, at little cost.

        The same wherever the data set lies. Of files it is their number and a checksum over their
        names and sizes, of arrays one over the values, of TFDS the version and the lengths of the
        shards. Keys are words for a message, values are numbers and texts.
        """

    def pictures(self, split: str) -> Iterator[tuple[str, Any, int]]:
        """Every record of a split as it is kept, in the stored order, whatever the host.

        Yields its name, then the image (a path, encoded bytes, or u8[H, W] or u8[H, W, 3]), then
        its label, -1 where there is none.
        """

    def chosen(self, split: str, rows: Sequence[int]) -> Iterator[tuple[str, Any, int]]:
        """Some records of a split, as `pictures` yields them, in the order of `rows`.

        Args:
          split: e.g. "train".
          rows: places in the stored order, in any order, repeated or not.

        Raises:
          UserError: at once, before a record is read or `rows` is looked at, where the split
            cannot be read out of order.
        """

    def part(self, split: str, count: int, seed: int) -> str:
        """A split to draw a sample from: this one, or a part of it where all is too much to read.

        Args:
          split: e.g. "test".
          count: records that the part has at least, if the split has so many.
          seed: of the place of the part.
        """

    def train(
        self,
        split: str,
        views: Mapping[int, Any],
        batch_size: int,
        seed: int,
        start: Position,
        max_unreadable: int,
    ) -> Batches:
        """Random resized crops of shuffled images, epoch after epoch, without end.

        Args:
          split: e.g. "train".
          views: view -> its crop, an object with the fields of `views.Crop`.
          batch_size: of this host.
          seed: of the order and of the crops.
          start: where to begin; any saved position gives what an unbroken iteration gives.
          max_unreadable: how many records may be skipped before it is an error.

        Raises:
          UserError: when the split is missing or smaller than a batch, or too much is unreadable.
        """

    def evaluate(
        self,
        split: str,
        size: int,
        resize: int,
        interpolation: str,
        batch_size: int,
        limit: int = 0,
    ) -> Iterator[dict[str, np.ndarray]]:
        """The middle of every image of this host's share, once, in the stored order.

        Every host yields the same number of batches, so that collectives in the loop match.

        Args:
          split: e.g. "test".
          size: S, the side of the square that is cut out.
          resize: the shorter side before the cut, >= size; 0 squeezes the whole image to SxS.
          interpolation: "bilinear" or "bicubic", antialiased.
          batch_size: b, of this host.
          limit: read no more than this many records over all hosts; 0 reads all.

        Returns:
          Batches of {"image": u8[b, S, S, 3], "label": i32[b], -1 where there is none,
          "mask": bool[b], False for the rows that fill up the last batch}.
        """


def checksum(parts: Iterable[bytes | memoryview]) -> int:
    """Returns the CRC-32 over bytes that come in parts."""
    return functools.reduce(lambda value, part: zlib.crc32(part, value), parts, 0)


def next_position(epoch: int, offset: int, share: int, batch_size: int) -> Position:
    """The position after a batch that ends at `offset`; skips a remainder too small for one more.

    Args:
      epoch: of the batch.
      offset: of the record after its last one.
      share: how many records an epoch of this host has.
      batch_size: of this host.
    """
    return Position(epoch + 1, 0) if share - offset < batch_size else Position(epoch, offset)


def seed_words(*numbers: int, words: int = 2) -> np.ndarray:
    """u64[words], well mixed from any whole numbers; the same on every platform."""
    entropy = [int(number) % 2**64 for number in numbers]
    return np.random.SeedSequence(entropy).generate_state(words, np.uint64)


def shuffled_share(count: int, seed: int, epoch: int, host: int, hosts: int) -> np.ndarray:
    """i64[count // hosts]: what a host reads of `count` records in an epoch, and in which order.

    All hosts draw one permutation and each takes its own places of it, so that no record is read
    twice in an epoch; up to hosts - 1 records, others in each epoch, are left out.
    """
    order = np.random.default_rng(seed_words(seed, epoch)).permutation(count)
    return order[host::hosts][: count // hosts]


def check_batch_size(name: str, split: str, share: int, batch_size: int) -> None:
    """Raises UserError unless a host's share of a split holds one batch at least."""
    if not 0 < batch_size <= share:
        raise UserError(
            f"config.batch_size gives this host {batch_size} images a step, but its share of the "
            f"split {split!r} of {name} has {share}: choose a batch between 1 and {share} a host."
        )


def check_evaluation(size: int, resize: int) -> None:
    """Raises UserError when the square to cut out does not fit into the resized image."""
    if resize and resize < size:
        raise UserError(
            f"resize={resize} is smaller than the crop of {size} px cut from it: choose "
            f"{size} or more, or 0 to squeeze the whole image to {size} px."
        )


def share_of_limit(limit: int, share: int, index: int, hosts: int) -> int:
    """How many records host `index` evaluates, so that all hosts together read at most `limit`.

    They read exactly that many but where `limit` falls a few short of all there are: the share of
    a host is then the smaller.
    """
    if not limit:
        return share
    return min(share, limit * (index + 1) // hosts - limit * index // hosts)


def evaluation_batches(count: int, limit: int, batch_size: int, hosts: int) -> int:
    """How many batches each host yields: enough for the largest share, the same everywhere."""
    records = min(count, limit) if limit else count
    return math.ceil(math.ceil(records / hosts) / batch_size)


def padded(images: np.ndarray, labels: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
    """One batch of an evaluation, filled up with black images, label -1 and mask False.

    Args:
      images: u8[n, S, S, 3], n <= batch_size.
      labels: whole numbers [n].
      batch_size: b.
    """
    n = len(images)
    image = np.zeros((batch_size, *images.shape[1:]), np.uint8)
    label = np.full(batch_size, -1, np.int32)
    image[:n], label[:n] = images, labels
    return {"image": image, "label": label, "mask": np.arange(batch_size) < n}


def contents(source: Source) -> list[str]:
    """What a data set has, and what lies beside it and is not used, a line each."""
    splits = ", ".join(f"{split} {source.count(split):,}" for split in source.splits)
    classes = "no labels"
    if source.num_classes:
        names = [printable(name) for name in source.class_names[:_NAMES_SHOWN]]
        more = ", ..." if len(source.class_names) > len(names) else ""
        shown = f" ({', '.join(names)}{more})" if names else ""
        classes = f"{source.num_classes:,} classes{shown}"
    return [
        f"{source.name}: images: {splits}; {classes}.",
        *(f"{source.name}: not used: {line}" for line in source.skipped.lines()),
    ]


def unreadable_limit(count: int, least: int, percent: float) -> int:
    """How many records may be unreadable before it is an error.

    Args:
      count: of the records that this host reads.
      least: config.data.max_unreadable, allowed whatever the count.
      percent: config.data.max_unreadable_percent, of the records.
    """
    return max(least, math.floor(count * percent / 100))


def report_unreadable(source: str, known: list[str], names: list[str], limit: int) -> None:
    """Adds new names to `known`, each with one warning.

    Args:
      source: the name of the data set.
      known: those reported before, of earlier starts too; changed in place.
      names: what could not be decoded just now.
      limit: see `unreadable_limit`.

    Raises:
      UserError: when more than `limit` are known.
    """
    for name in names:
        if name not in known:
            known.append(name)
            _LOG.warning("%s: skipped %s, which cannot be decoded.", source, name)
    if len(known) > limit:
        more = ", ..." if len(known) > _NAMES_SHOWN else ""
        file = known.file if isinstance(known, UnreadableNames) else ""
        kept = f" {file} keeps their names over restarts: remove it after a repair." if file else ""
        raise UserError(
            f"{len(known)} records of {source} cannot be decoded, more than {limit} (see "
            "config.data.max_unreadable and config.data.max_unreadable_percent): "
            f"{', '.join(known[:_NAMES_SHOWN])}{more}. Repair or remove them, or raise one of the "
            f"two settings.{kept}"
        )
