"""Bags: images that a teacher finds alike, and batches that show two members of a bag."""

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
        return len(self.clusters if self.neighbours is None else self.neighbours)

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
        own = self.clusters[records]
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
        sizes = np.bincount(self.clusters)
        return np.argsort(self.clusters, kind="stable"), np.cumsum(sizes) - sizes, sizes


class BagSource:
    """A `base.Source` whose training batches also show another member of each image's bag.

    All but `train` is the wrapped source's. Pictures are read through `Source.pictures`: paths
    and arrays cost nothing, but of a TFDS data set the encoded bytes are held in memory.
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
        self._pictures: dict[str, list[tuple[str, Any, int]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def train(
        self,
        split: str,
        views: Mapping[int, Any],
        batch_size: int,
        seed: int,
        start: base.Position,
        max_unreadable: int,
    ) -> Iterator[base.HostBatch]:
        """Random resized crops; see `base.Source`. `aux` has "cluster", i32[b], if there are any.

        Raises:
          UserError: also when the bags are of another number of records.
        """
        check_crops(views)
        count = self._source.count(split)
        if count != len(self._bags):
            raise UserError(
                f"config.bags.file holds bags of {len(self._bags)} images, but split {split!r} of "
                f"{self._source.name} has {count}: make them again with `disco-jax bags`."
            )
        share = count // self._hosts
        base.check_batch_size(self._source.name, split, share, batch_size)
        if split not in self._pictures:
            self._pictures[split] = list(self._source.pictures(split))
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
                    labels = [self._pictures[split][record][2] for record, *_ in rows]
                    yield base.HostBatch(
                        *self._batch(pool, views, rows, where, begin),
                        after,
                        np.array(labels, np.int32),
                    )
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
        """[(record, image, other image)] of the next batch and the offset after it."""
        rows = []
        while len(rows) < batch_size and offset < share:
            end = min(offset + batch_size - len(rows), share)
            wanted = np.stack([anchors[offset:end], others[offset:end]], axis=1)
            if not self._members:
                wanted = wanted[:, :1]
            read = list(pool.map(self._read, itertools.repeat(split), wanted.ravel()))
            bad = [name for name, image in read if image is None]
            base.report_unreadable(self._source.name, self._source.unreadable, bad, limit)
            pairs = zip(*[iter(image for _, image in read)] * wanted.shape[1], strict=True)
            for record, pair in zip(wanted[:, 0], pairs, strict=True):
                if all(image is not None for image in pair):
                    rows.append((record, pair[0], pair[-1]))
            offset = end
        return rows, offset

    def _read(self, split: str, record: int) -> tuple[str, np.ndarray | None]:
        """The name of a record and its u8[H, W] or u8[H, W, 3]; None if it cannot be decoded."""
        name, image, _ = self._pictures[split][record]
        if isinstance(image, np.ndarray):
            return name, image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
        try:
            return name, decode.decode(image)
        except decode.Unreadable:
            return name, None

    def _batch(self, pool, views, rows, where, begin):
        """The crops of every view, and the clusters of the images."""
        records, images, others = zip(*rows, strict=True)
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
