"""The data source contract: positions, host batches, and the sharding of records across hosts.

An epoch is a fresh shuffle of this host's share of a split and a pure function of (seed, epoch,
host). Batches never span epochs and the remainder of an epoch is dropped, so saving a `Position`
is enough to resume a run exactly.
"""

import dataclasses
import functools
import logging
import math
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from disco_jax.data.seeds import seed_words
from disco_jax.data.skips import Skipped, UnreadableNames, printable
from disco_jax.errors import UserError

_LOG = logging.getLogger(__name__)
_NAMES_SHOWN = 10  # unreadable records or classes listed in a message
MAX_CLASSES = 2**24  # larger labels are rejected as mistakes


@dataclasses.dataclass(frozen=True)
class Position:
    """A position in the shuffled order of an epoch on this host.

    Attributes:
      epoch: index of the epoch, from 0.
      offset: number of records of the shuffled order already consumed, including unreadable ones.
    """

    epoch: int
    offset: int

    @classmethod
    def start(cls) -> "Position":
        """Returns the position of the first record of the first epoch."""
        return cls(0, 0)


class HostBatch(NamedTuple):
    """The data one host reads for one training step.

    Attributes:
      views: view -> u8[b, S, S, 3], the crop of each image for that view.
      aux: name -> array[b, ...] or a tree of arrays, additional inputs of a method; {} if none.
      position: start of the next batch.
      labels: i32[b], -1 for unlabelled images. Only probes read them, no method does.
      rows: i64[b], index of each image in the stored order of its split, across all hosts.
    """

    views: dict[int, np.ndarray]
    aux: dict[str, Any]
    position: Position
    labels: np.ndarray
    rows: np.ndarray


# An infinite generator; the consumer must close it.
Batches = Generator[HostBatch, None, None]


class Source(Protocol):
    """A data set of images; arrays, folders and TFDS each have an implementation.

    Attributes:
      name: name of the data set.
      num_classes: number of classes; None if no image has a label.
      class_names: names of the classes in label order; () if the labels are plain numbers.
      skipped: files found at the location of the data set that are not used.
      unreadable: names of the records skipped so far because they could not be decoded.
    """

    name: str
    num_classes: int | None
    class_names: Sequence[str]
    skipped: Skipped
    unreadable: UnreadableNames

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""

    def count(self, split: str) -> int:
        """Returns the number of records of a split over all hosts."""

    def fingerprint(self, split: str) -> dict[str, Any]:
        """Returns a cheap fingerprint that identifies the images of a split.

        It does not depend on the location of the data set. For files it holds their number and a
        checksum of their names and sizes, for arrays a checksum of the values, and for TFDS the
        version and the shard lengths. Keys are descriptions for messages; values are numbers and
        strings.
        """

    def iter_images(self, split: str) -> Iterator[tuple[str, Any, int]]:
        """Yields every record of a split as stored, in the stored order, on every host.

        Each item is (name, image, label). The image is a path, encoded bytes, u8[H, W] or
        u8[H, W, 3]; the label is -1 for unlabelled images.
        """

    def take(self, split: str, rows: Sequence[int]) -> Iterator[tuple[str, Any, int]]:
        """Yields selected records of a split like `iter_images`, in the order of `rows`.

        Args:
          split: name of the split, e.g. "train".
          rows: indices in the stored order, in any order, possibly repeated.

        Raises:
          UserError: the split does not support random access. Raised immediately, before a record
            is read or `rows` is inspected.
        """

    def part(self, split: str, count: int, seed: int) -> str:
        """Returns the split to sample from: `split`, or a slice of it if it is too large to read.

        Args:
          split: name of the split, e.g. "test".
          count: minimum number of records of the slice, if the split has that many.
          seed: seed for the position of the slice.
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
        """Yields batches of random resized crops of shuffled images, indefinitely.

        Args:
          split: name of the split, e.g. "train".
          views: view -> its crop, an object with the fields of `views.Crop`.
          batch_size: batch size of this host.
          seed: seed for the order and the crops.
          start: position to start at. Resuming from a saved position yields the same batches as
            an uninterrupted iteration.
          max_unreadable: number of unreadable records to skip before raising an error.

        Raises:
          UserError: the split is missing or smaller than a batch, or too many records are
            unreadable.
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
        """Yields the center crop of every image of this host's share once, in the stored order.

        Every host yields the same number of batches, so that collectives in the loop match.

        Args:
          split: name of the split, e.g. "test".
          size: S, the side of the square crop in pixels.
          resize: length of the shorter side before cropping, >= size; 0 resizes the whole image
            to SxS and ignores its aspect ratio.
          interpolation: "bilinear" or "bicubic", antialiased.
          batch_size: b, the batch size of this host.
          limit: maximum number of records to read over all hosts; 0 reads all.

        Returns:
          Batches of {"image": u8[b, S, S, 3], "label": i32[b], "mask": bool[b]}. The label is -1
          for unlabelled images; the mask is False for the padding of the last batch.
        """


def checksum(blocks: Iterable[bytes | memoryview]) -> int:
    """Returns the CRC-32 of the concatenation of blocks of bytes."""
    return functools.reduce(lambda value, block: zlib.crc32(block, value), blocks, 0)


def next_position(epoch: int, offset: int, share: int, batch_size: int) -> Position:
    """Returns the position after a batch; skips a remainder of the epoch smaller than a batch.

    Args:
      epoch: epoch of the batch.
      offset: offset of the record after the last one of the batch.
      share: number of records this host reads in an epoch.
      batch_size: batch size of this host.
    """
    return Position(epoch + 1, 0) if share - offset < batch_size else Position(epoch, offset)


def shuffled_share(count: int, seed: int, epoch: int, host: int, hosts: int) -> np.ndarray:
    """Returns i64[count // hosts], the records one host reads in an epoch, in reading order.

    All hosts draw the same permutation of `count` records and each takes every hosts-th entry, so
    that no record is read twice in an epoch. Up to hosts - 1 records are dropped, different ones
    in each epoch.
    """
    order = np.random.default_rng(seed_words(seed, epoch)).permutation(count)
    return order[host::hosts][: count // hosts]


def check_batch_size(name: str, split: str, share: int, batch_size: int) -> None:
    """Raises UserError unless a host's share of a split holds at least one batch."""
    if not 0 < batch_size <= share:
        raise UserError(
            f"config.batch_size gives this host {batch_size} images a step, but its share of the "
            f"split {split!r} of {name} has {share}: choose a batch between 1 and {share} a host."
        )


def check_evaluation(size: int, resize: int) -> None:
    """Raises UserError if the center crop does not fit into the resized image."""
    if resize and resize < size:
        raise UserError(
            f"resize={resize} is smaller than the crop of {size} px cut from it: choose "
            f"{size} or more, or 0 to squeeze the whole image to {size} px."
        )


def share_of_limit(limit: int, share: int, index: int, hosts: int) -> int:
    """Returns the number of records host `index` evaluates under a limit over all hosts.

    The counts of all hosts sum to `limit`, or to a little less if `limit` is close to the size of
    the split, because a host never evaluates more than its share.
    """
    if not limit:
        return share
    return min(share, limit * (index + 1) // hosts - limit * index // hosts)


def evaluation_batches(count: int, limit: int, batch_size: int, hosts: int) -> int:
    """Returns the number of batches every host yields, enough for the largest share."""
    records = min(count, limit) if limit else count
    return math.ceil(math.ceil(records / hosts) / batch_size)


def padded(images: np.ndarray, labels: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
    """Pads an evaluation batch with black images, label -1 and mask False.

    Args:
      images: u8[n, S, S, 3], n <= batch_size.
      labels: int[n].
      batch_size: b, the size of the padded batch.
    """
    n = len(images)
    image = np.zeros((batch_size, *images.shape[1:]), np.uint8)
    label = np.full(batch_size, -1, np.int32)
    image[:n], label[:n] = images, labels
    return {"image": image, "label": label, "mask": np.arange(batch_size) < n}


def contents(source: Source) -> list[str]:
    """Returns lines that describe a data set and the files at its location that are not used."""
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
    """Returns the number of unreadable records that are tolerated.

    Args:
      count: number of records this host reads.
      least: config.data.max_unreadable, tolerated for any count.
      percent: config.data.max_unreadable_percent, percentage of `count`.
    """
    return max(least, math.floor(count * percent / 100))


def report_unreadable(source: str, reported: list[str], names: list[str], limit: int) -> None:
    """Appends new names to `reported` and logs one warning for each.

    Args:
      source: name of the data set.
      reported: names reported before, including earlier starts of the run; changed in place.
      names: names of the records that could not be decoded now.
      limit: see `unreadable_limit`.

    Raises:
      UserError: more than `limit` names have been reported.
    """
    for name in names:
        if name not in reported:
            reported.append(name)
            _LOG.warning("%s: skipped %s, which cannot be decoded.", source, name)
    if len(reported) > limit:
        more = ", ..." if len(reported) > _NAMES_SHOWN else ""
        file = reported.file if isinstance(reported, UnreadableNames) else ""
        hint = (
            f" {file} keeps their names across restarts: delete it after a repair." if file else ""
        )
        raise UserError(
            f"{len(reported)} records of {source} cannot be decoded, more than {limit} (see "
            "config.data.max_unreadable and config.data.max_unreadable_percent): "
            f"{', '.join(reported[:_NAMES_SHOWN])}{more}. Repair or remove them, or raise one of "
            f"the two settings.{hint}"
        )
