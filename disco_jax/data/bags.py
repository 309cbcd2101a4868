"""Bags: images that a teacher finds alike, and batches that show two members of a bag."""

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from disco_jax.data import base, decode
from disco_jax.data.arrays import crop_all
from disco_jax.data.encoded import check_crops
from disco_jax.errors import UserError, unknown

SAMPLING = ("images", "clusters")
_THREADS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Bags:
    """Which records of a split belong together, in its stored order.

    Attributes:
      neighbours: i32[N, k], the records nearest to each, itself not among them; None for clusters.
      clusters: i32[N], the cluster of each; None for neighbours.
    """

    neighbours: np.ndarray | None = None
    clusters: np.ndarray | None = None

    def __post_init__(self):
        assert (self.neighbours is None) != (self.clusters is None)

    @classmethod
    def load(cls, path: str) -> "Bags":
        """What `save` wrote.

        Raises:
          UserError: there is no such file, or it holds something else.
        """
        file = epath.Path(path)
        if not file.is_file():
            raise UserError(
                f"config.bags.file={path!r} does not exist; `disco-jax bags` makes such a file."
            )
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
                found = {name: stored[name] for name in stored.files}
            return cls(found.get("neighbours"), found.get("clusters"))
        except Exception as error:
            raise UserError(f"config.bags.file={path!r} holds no bags: {error}") from error

    def save(self, file: Any) -> None:
        """Writes an .npz to an open binary file."""
        fields = dataclasses.asdict(self)
        np.savez_compressed(file, **{k: v for k, v in fields.items() if v is not None})

    def __len__(self) -> int:
        return len(self._labels if self.neighbours is None else self.neighbours)

    def members(self, records: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """Another record of the bag of each, drawn evenly.

        Args:
          records: i64[n].
          chance: f64[n] in [0, 1).

        Returns:
          i64[n]; a record that is alone in its cluster stands for itself.
        """
        if self.neighbours is not None:
            columns = (chance * self.neighbours.shape[1]).astype(np.int64)
            return self.neighbours[records, columns].astype(np.int64)
        order, first, sizes = self._by_cluster()
        own = self._labels[records]
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        others = np.maximum(sizes[own] - 1, 1)
        step = np.where(sizes[own] > 1, 1 + (chance * others).astype(np.int64), 0)
        return order[first[own] + (place[records] - first[own] + step) % np.maximum(sizes[own], 1)]

    def sampled(self, generator: np.random.Generator) -> np.ndarray:
        """i64[N]: N records, each of a cluster drawn evenly among those that are not empty."""
        order, first, sizes = self._by_cluster()
        clusters = generator.choice(np.flatnonzero(sizes), len(order))
        inside = (generator.random(len(order)) * sizes[clusters]).astype(np.int64)
        return order[first[clusters] + inside]

    def _by_cluster(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Records sorted by cluster; where each cluster starts there; its size."""
        sizes = np.bincount(self._labels)
        return np.argsort(self._labels, kind="stable"), np.cumsum(sizes) - sizes, sizes

    @property
    def _labels(self) -> np.ndarray:
        """`clusters`, where bags are clusters."""
        assert self.clusters is not None
        return self.clusters


class _Row(NamedTuple):
    """What a batch shows of one record: its picture and one of its bag, u8[H, W] or u8[H, W, 3]."""

    record: int
    image: np.ndarray
    other: np.ndarray
    label: int


class BagSource:
    """A `base.Source` whose training batches also show another member of each image's bag.

    All but `train` is the wrapped source's. The pictures of a batch are read as it is made,
    through `Source.chosen`, and none is kept: a data set of any size will do that can be read
    out of order.
    """

    def __init__(
        self,
        source: base.Source,
        bags: Bags,
        members: Sequence[int] = (),
        *,
        sampling: str = "images",
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Wraps `source`.

        Args:
          source: where the images are from.
          bags: of its training split.
          members: views that show the other member; the rest show the image itself.
          sampling: "images": each once an epoch; "clusters": see `Bags.sampled`.
          process_index, process_count: of this host.

        Raises:
          UserError: sampling by clusters of bags that have none, or unknown.
        """
        if sampling not in SAMPLING:
            raise unknown("config.bags.sampling", sampling, SAMPLING)
        if sampling == "clusters" and bags.clusters is None:
            raise UserError(
                "config.bags.sampling='clusters', but config.bags.file holds neighbours: make it "
                "with `disco-jax bags --config.kind=kmeans`."
            )
        self._source, self._bags, self._members = source, bags, frozenset(members)
        self._sampling, self._host, self._hosts = sampling, process_index, process_count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def check(self, split: str) -> None:
        """Refuses a split whose records the bags do not name, or that cannot be picked out.

        Raises:
          UserError: the bags are of another number of records, or see `base.Source.chosen`.
        """
        count = self._source.count(split)
        if count != len(self._bags):
            raise UserError(
                f"config.bags.file holds bags of {len(self._bags)} images, but split {split!r} of "
                f"{self._source.name} has {count}: make them again with `disco-jax bags`."
            )
        self._source.chosen(split, ())

    def train(
        self,
        split: str,
        views: Mapping[int, Any],
        batch_size: int,
        seed: int,
        start: base.Position,
        max_unreadable: int,
    ) -> base.Batches:
        """Random resized crops; see `base.Source`. `aux` has "cluster", i32[b], if there are any.

        Raises:
          UserError: also for what `check` refuses.
        """
        check_crops(views)
        self.check(split)
        share = len(self._bags) // self._hosts
        base.check_batch_size(self._source.name, split, share, batch_size)
        return self._train(split, share, views, batch_size, seed, start, max_unreadable)

    def _train(self, split, share, views, batch_size, seed, start, limit):
        offset = start.offset
        with ThreadPoolExecutor(_THREADS) as pool:
            for epoch in itertools.count(start.epoch):
                anchors, others = self._order(seed, epoch)
                any_batch = offset > 0
                while share - offset >= batch_size:
                    where, begin = (seed, epoch, self._host), offset
                    rows, offset = self._readable(
                        pool, split, anchors, others, offset, share, batch_size, limit
                    )
                    if len(rows) < batch_size:
                        break
                    any_batch = True
                    after = base.next_position(epoch, offset, share, batch_size)
                    labels = np.array([row.label for row in rows], np.int32)
                    records = np.array([row.record for row in rows], np.int64)
                    made = self._batch(pool, views, rows, where, begin)
                    yield base.HostBatch(*made, after, labels, records)
                if not any_batch:  # too much is unreadable to fill one batch
                    base.check_batch_size(self._source.name, split, 0, batch_size)
                offset = 0

    def _order(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """This host's records of an epoch, and another member of each one's bag."""
        generator = np.random.default_rng(base.seed_words(seed, epoch))
        if self._sampling == "clusters":
            anchors = self._bags.sampled(generator)
        else:
            anchors = generator.permutation(len(self._bags))
        others = self._bags.members(anchors, generator.random(len(anchors)))
        return anchors[self._host :: self._hosts], others[self._host :: self._hosts]

    def _readable(self, pool, split, anchors, others, offset, share, batch_size, limit):
        """The next batch and the offset after it; of a pair both must be readable."""
        rows = []
        while len(rows) < batch_size and offset < share:
            end = min(offset + batch_size - len(rows), share)
            wanted = np.stack([anchors[offset:end], others[offset:end]], axis=1)
            if not self._members:
                wanted = wanted[:, :1]
            stored = self._source.chosen(split, wanted.ravel().tolist())
            read = list(pool.map(_decoded, stored))
            bad = [name for name, image, _ in read if image is None]
            base.report_unreadable(self._source.name, self._source.unreadable, bad, limit)
            pairs = zip(*[iter(read)] * wanted.shape[1], strict=True)
            for record, pair in zip(wanted[:, 0], pairs, strict=True):
                if all(image is not None for _, image, _ in pair):
                    rows.append(_Row(record, pair[0][1], pair[-1][1], pair[0][2]))
            offset = end
        return rows, offset

    def _batch(self, pool, views, rows, where, begin):
        """The crops of every view, and the clusters of the images."""
        records, images, others, _ = zip(*rows, strict=True)
        made = {
            view: crop_all(
                others if view in self._members else images, crop, (*where, view, begin), pool.map
            )
            for view, crop in views.items()
        }
        aux = {}
        if self._bags.clusters is not None:
            aux["cluster"] = self._bags.clusters[np.array(records)].astype(np.int32)
        return made, aux


def _decoded(stored: tuple[str, Any, int]) -> tuple[str, np.ndarray | None, int]:
    """A record with its picture as u8[H, W] or u8[H, W, 3]; None if it cannot be decoded."""
    name, image, label = stored
    if isinstance(image, np.ndarray):
        grey = image.ndim == 3 and image.shape[-1] == 1
        return name, image[..., 0] if grey else image, label
    try:
        return name, decode.decode(image), label
    except decode.Unreadable:
        return name, None, label
