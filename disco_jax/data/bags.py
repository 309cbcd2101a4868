"""Bags of images with similar teacher features, and batches that pair two members of a bag."""

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from disco_jax.data import contract, decode
from disco_jax.data.arrays import crop_all
from disco_jax.data.encoded import check_crops
from disco_jax.data.seeds import seed_words
from disco_jax.errors import UserError, unknown

SAMPLING = ("images", "clusters")
_THREADS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Bags:
    """Groups of related records of a split; indices refer to its stored order.

    Exactly one of the two attributes is set.

    Attributes:
      neighbours: i32[N, k], the nearest neighbours of each record, excluding itself.
      clusters: i32[N], the cluster of each record.
    """

    neighbours: np.ndarray | None = None
    clusters: np.ndarray | None = None

    def __post_init__(self):
        assert (self.neighbours is None) != (self.clusters is None)

    @classmethod
    def load(cls, path: str) -> "Bags":
        """Loads a file written by `save`.

        Raises:
          UserError: the file does not exist or does not hold bags.
        """
        file = epath.Path(path)
        if not file.is_file():
            raise UserError(
                f"config.bags.file={path!r} does not exist; create it with `disco-jax bags`."
            )
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            return cls(arrays.get("neighbours"), arrays.get("clusters"))
        except Exception as error:
            raise UserError(f"config.bags.file={path!r} does not hold bags: {error}") from error

    def save(self, file: Any) -> None:
        """Writes an .npz to an open binary file."""
        fields = dataclasses.asdict(self)
        np.savez_compressed(file, **{k: v for k, v in fields.items() if v is not None})

    def __len__(self) -> int:
        return len(self._labels if self.neighbours is None else self.neighbours)

    def members(self, records: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """Draws another record from the bag of each record, uniformly.

        Args:
          records: i64[n].
          chance: f64[n] in [0, 1), one uniform draw per record.

        Returns:
          i64[n]. A record that is alone in its cluster is returned itself.
        """
        if self.neighbours is not None:
            columns = (chance * self.neighbours.shape[1]).astype(np.int64)
            return self.neighbours[records, columns].astype(np.int64)
        order, first, sizes = self._by_cluster()
        clusters = self._labels[records]
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        num_others = np.maximum(sizes[clusters] - 1, 1)
        step = np.where(sizes[clusters] > 1, 1 + (chance * num_others).astype(np.int64), 0)
        return order[
            first[clusters]
            + (rank[records] - first[clusters] + step) % np.maximum(sizes[clusters], 1)
        ]

    def sampled(self, generator: np.random.Generator) -> np.ndarray:
        """Returns i64[N], records drawn uniformly from clusters drawn uniformly.

        Empty clusters are never drawn.
        """
        order, first, sizes = self._by_cluster()
        clusters = generator.choice(np.flatnonzero(sizes), len(order))
        inside = (generator.random(len(order)) * sizes[clusters]).astype(np.int64)
        return order[first[clusters] + inside]

    def _by_cluster(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the records sorted by cluster, the start of each cluster there, and its size."""
        sizes = np.bincount(self._labels)
        return np.argsort(self._labels, kind="stable"), np.cumsum(sizes) - sizes, sizes

    @property
    def _labels(self) -> np.ndarray:
        """The clusters; fails if the bags are neighbours."""
        assert self.clusters is not None
        return self.clusters


class _Row(NamedTuple):
    """A record and another member of its bag; images are u8[H, W] or u8[H, W, 3]."""

    record: int
    image: np.ndarray
    other: np.ndarray
    label: int


class BagSource:
    """A `contract.Source` whose training batches also contain another member of each image's bag.

    Everything except `train` is delegated to the wrapped source. The images of a batch are read
    when the batch is built, through `Source.take`, and are not cached, so any size of data set
    works if the source supports random access.
    """

    def __init__(
        self,
        source: contract.Source,
        bags: Bags,
        members: Sequence[int] = (),
        *,
        sampling: str = "images",
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Wraps `source`.

        Args:
          source: source of the images.
          bags: bags of its training split.
          members: views that show the other member; the remaining views show the image itself.
          sampling: "images" reads each image once an epoch; "clusters": see `Bags.sampled`.
          process_index: index of this host.
          process_count: number of hosts.

        Raises:
          UserError: `sampling` is unknown, or it is "clusters" and the bags have none.
        """
        if sampling not in SAMPLING:
            raise unknown("config.bags.sampling", sampling, SAMPLING)
        if sampling == "clusters" and bags.clusters is None:
            raise UserError(
                "config.bags.sampling='clusters', but config.bags.file holds neighbours: create "
                "the file with `disco-jax bags --config.kind=kmeans`."
            )
        self._source, self._bags, self._members = source, bags, frozenset(members)
        self._sampling, self._host, self._hosts = sampling, process_index, process_count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def check(self, split: str) -> None:
        """Checks that the bags fit the split.

        Raises:
          UserError: the bags have another number of records than the split, or the source does
            not support random access (see `contract.Source.take`).
        """
        count = self._source.count(split)
        if count != len(self._bags):
            raise UserError(
                f"config.bags.file holds bags of {len(self._bags)} images, but split {split!r} of "
                f"{self._source.name} has {count}: recreate them with `disco-jax bags`."
            )
        self._source.take(split, ())

    def train(
        self,
        split: str,
        views: Mapping[int, Any],
        batch_size: int,
        seed: int,
        start: contract.Position,
        max_unreadable: int,
    ) -> contract.Batches:
        """Yields batches of random resized crops; see `contract.Source`.

        If the bags are clusters, `aux` has "cluster", i32[b].

        Raises:
          UserError: see `contract.Source.train` and `check`.
        """
        check_crops(views)
        self.check(split)
        share = len(self._bags) // self._hosts
        contract.check_batch_size(self._source.name, split, share, batch_size)
        return self._train(split, share, views, batch_size, seed, start, max_unreadable)

    def _train(self, split, share, views, batch_size, seed, start, limit):
        offset = start.offset
        with ThreadPoolExecutor(_THREADS) as pool:
            for epoch in itertools.count(start.epoch):
                anchors, others = self._order(seed, epoch)
                any_batch = offset > 0
                while share - offset >= batch_size:
                    seeds, first = (seed, epoch, self._host), offset
                    rows, offset = self._readable(
                        pool, split, anchors, others, offset, share, batch_size, limit
                    )
                    if len(rows) < batch_size:
                        break
                    any_batch = True
                    after = contract.next_position(epoch, offset, share, batch_size)
                    labels = np.array([row.label for row in rows], np.int32)
                    records = np.array([row.record for row in rows], np.int64)
                    views_and_aux = self._batch(pool, views, rows, seeds, first)
                    yield contract.HostBatch(*views_and_aux, after, labels, records)
                if not any_batch:  # too few readable records to fill a batch
                    contract.check_batch_size(self._source.name, split, 0, batch_size)
                offset = 0

    def _order(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns this host's records of an epoch and another member of the bag of each."""
        generator = np.random.default_rng(seed_words(seed, epoch))
        if self._sampling == "clusters":
            anchors = self._bags.sampled(generator)
        else:
            anchors = generator.permutation(len(self._bags))
        others = self._bags.members(anchors, generator.random(len(anchors)))
        return anchors[self._host :: self._hosts], others[self._host :: self._hosts]

    def _readable(self, pool, split, anchors, others, offset, share, batch_size, limit):
        """Returns the next batch of readable pairs and the offset after it.

        A pair is skipped if either of its images is unreadable.
        """
        rows = []
        while len(rows) < batch_size and offset < share:
            end = min(offset + batch_size - len(rows), share)
            pairs = np.stack([anchors[offset:end], others[offset:end]], axis=1)
            if not self._members:
                pairs = pairs[:, :1]
            stored = self._source.take(split, pairs.ravel().tolist())
            read = list(pool.map(_decoded, stored))
            bad = [name for name, image, _ in read if image is None]
            contract.report_unreadable(self._source.name, self._source.unreadable, bad, limit)
            read_pairs = zip(*[iter(read)] * pairs.shape[1], strict=True)
            for record, pair in zip(pairs[:, 0], read_pairs, strict=True):
                if all(image is not None for _, image, _ in pair):
                    rows.append(_Row(record, pair[0][1], pair[-1][1], pair[0][2]))
            offset = end
        return rows, offset

    def _batch(self, pool, views, rows, seeds, begin):
        """Returns the crops of every view, and the auxiliary inputs (clusters, if any)."""
        records, images, others, _ = zip(*rows, strict=True)
        crops = {
            view: crop_all(
                others if view in self._members else images, crop, (*seeds, view, begin), pool.map
            )
            for view, crop in views.items()
        }
        aux = {}
        if self._bags.clusters is not None:
            aux["cluster"] = self._bags.clusters[np.array(records)].astype(np.int32)
        return crops, aux


def _decoded(stored: tuple[str, Any, int]) -> tuple[str, np.ndarray | None, int]:
    """Decodes the image of a record to u8[H, W] or u8[H, W, 3], or None if it is unreadable."""
    name, image, label = stored
    if isinstance(image, np.ndarray):
        grey = image.ndim == 3 and image.shape[-1] == 1
        return name, image[..., 0] if grey else image, label
    try:
        return name, decode.decode(image), label
    except decode.Unreadable:
        return name, None, label
