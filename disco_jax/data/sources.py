"""Prepared TFDS data sets: records are read by tf.data or array_record, images by threads.

TensorFlow is imported lazily, so importing this module is cheap. Nothing is downloaded.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from disco_jax.data import contract, crops, decode, tfdata
from disco_jax.data.encoded import CropEpoch, EncodedSource, Record, chunks_ahead
from disco_jax.data.records import Rows
from disco_jax.data.seeds import seed_words
from disco_jax.data.tensorflow_import import tensorflow
from disco_jax.errors import UserError, did_you_mean, unknown

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_INFO = "dataset_info.json"
_FILE_NAME = "file_name"  # feature of TFDS's ImageNet
# Smaller splits are held in memory: they are shuffled fully and an epoch starts without delay.
_MAX_CACHED_BYTES = 200e6
# Images of one size with at most this number of pixels are cropped a batch at a time.
_MAX_BATCHED_PIXELS = 64 * 64


def data_directory(data_dir: str = "") -> epath.Path:
    """Returns the TFDS directory: data_dir, else TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return epath.Path(
        data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    ).expanduser()


def available(data_dir: str = "") -> list[str]:
    """Lists the prepared data sets in a directory as "name" or "name/config"."""
    names, root = [], data_directory(data_dir)
    for folder in sorted(_folders(root)):
        if _versions(folder):
            names.append(folder.name)
        names += [f"{folder.name}/{f.name}" for f in sorted(_folders(folder)) if _versions(f)]
    return names


def find(name: str, data_dir: str = "") -> epath.Path:
    """Returns the version folder of a prepared data set; takes the highest version.

    Args:
      name: "name", "name/config", or the path of a version folder.
      data_dir: see `data_directory`.

    Raises:
      UserError: the data set is not prepared. The message lists the available data sets and how to
        prepare this one.
    """
    if name and (epath.Path(name) / _INFO).exists():
        return epath.Path(name)
    root = data_directory(data_dir)
    versions = _versions(root / name) if name else []
    if not versions:
        raise _not_prepared(name, root, available(data_dir))
    return max(versions, key=lambda folder: [int(part) for part in folder.name.split(".")])


def _folders(folder):
    return [child for child in folder.iterdir() if child.is_dir()] if folder.is_dir() else []


def _versions(folder):
    return [f for f in _folders(folder) if _VERSION.fullmatch(f.name) and (f / _INFO).exists()]


def _not_prepared(name, root, names):
    if name == "imagenet2012" or name.startswith("imagenet2012/"):
        instructions = (
            "put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, which image-net.org gives "
            f"to registered users, into {root / 'downloads' / 'manual'} and run "
            f"`tfds build {name} --data_dir {root}`"
        )
    else:
        instructions = f"`tfds build {name or 'NAME'} --data_dir {root}`"
    available_names = (
        ", ".join(names) if names else "nothing" if root.is_dir() else "no such directory"
    )
    return UserError(
        f"config.data.name={name!r} is not prepared in {root}.{did_you_mean(name, names)} "
        f"Available: {available_names}. To prepare it: {instructions}. To use another directory, "
        "set config.data.dir or TFDS_DATA_DIR."
    )


class TfdsSource(EncodedSource):
    """A `contract.Source` over a prepared TFDS data set."""

    def __init__(
        self,
        name: str,
        data_dir: str = "",
        *,
        cache: bool = False,
        shuffle_buffer: int = 16_384,
        subset: Mapping[str, Collection[str]] | None = None,
        max_unreadable: int = 0,
        max_unreadable_percent: float = 0.0,
        reader: str = "threads",
        rules: decode.Rules = decode.DEFAULT_RULES,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Opens a data set and reads only its metadata.

        Args:
          name: see `find`.
          data_dir: see `data_directory`.
          cache: whether to hold this host's encoded records in memory whatever their size.
          shuffle_buffer: number of encoded records of TFRecord files held for shuffling.
          subset: split -> names of the files to keep; located by reading the split once.
          reader: how training images are decoded and cropped: "threads" (OpenCV or Pillow) or
            "tfdata" (TensorFlow).
          max_unreadable, max_unreadable_percent, rules, process_index, process_count: see
            `EncodedSource`.
        """
        super().__init__(
            max_unreadable,
            process_index,
            process_count,
            max_unreadable_percent=max_unreadable_percent,
            rules=rules,
        )
        folder = find(name, data_dir)
        _, tfds = tensorflow()
        self._builder = tfds.builder_from_directory(os.fspath(folder))
        self.name = self._builder.info.name
        self._image, self._label = _image_and_label(self._builder.info)
        features = self._builder.info.features
        self.num_classes = features[self._label].num_classes if self._label else None
        self._cache, self._shuffle_buffer, self._reader = cache, shuffle_buffer, reader
        self._subset = {split: frozenset(names) for split, names in (subset or {}).items()}
        if self._subset and _FILE_NAME not in features:
            raise UserError(
                f"config.data.subset selects records by file name, but {self.name} has no feature "
                f"{_FILE_NAME!r}; its features are: {', '.join(features)}."
            )
        self._rows: dict[str, Rows] = {}
        # Caches: split -> encoded records.
        self._share_records: dict[str, list[Record]] = {}  # this host's share
        self._all_records: dict[str, list[Record]] = {}  # shares of all hosts
        self._subset_records: dict[str, list[Record]] = {}  # the whole subset, which is small
        self._subset_rows: dict[str, list[int]] = {}  # split -> rows of the subset in the split
        self._share_pixels: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return list(self._builder.info.splits)

    def count(self, split: str) -> int:
        """Returns the number of records of a split over all hosts."""
        if split in self._subset:
            return len(self._subset[split])
        return self._rows_of(split).count

    def fingerprint(self, split: str) -> dict[str, Any]:
        """Returns version, number of records and shard lengths; see `contract.Source`."""
        rows = self._rows_of(split)
        fingerprint = {
            "data set": str(self._builder.info.full_name),
            "records": self.count(split),
            "lengths of shards (CRC-32)": contract.checksum([rows.runs.astype("<i8").tobytes()]),
        }
        if split in self._subset:
            names = "\n".join(sorted(self._subset[split]))
            fingerprint["names of the subset (CRC-32)"] = contract.checksum([os.fsencode(names)])
        return fingerprint

    def part(self, split: str, count: int, seed: int) -> str:
        """Returns a contiguous slice of a large split, because labels are read with the images.

        TFDS shuffles data sets when it prepares them, so classes are mixed in any slice.
        """
        total = self.count(split)
        if split in self._subset or self._in_memory(split) or "[" in split or total <= count:
            return split
        first = int(np.random.default_rng(seed).integers(total - count + 1))
        return f"{split}[{first}:{first + count}]"

    def _rows_of(self, split: str) -> Rows:
        splits = self._builder.info.splits
        if re.split(r"[\[+]", split)[0] not in splits:
            raise unknown(f"The split of {self.name}", split, splits)
        if split not in self._rows:
            text = _FILE_NAME if split in self._subset else ""
            self._rows[split] = Rows(self._builder, split, self._image, self._label, text)
        return self._rows[split]

    def _name(self, split: str, row: int) -> str:
        if split in self._subset:
            row = self._subset_rows[split][row]
        return self._rows_of(split).name(row)

    def _stored(self, split: str, first: int, last: int) -> Iterable[Record]:
        if split in self._subset:
            return self._load_subset(split)[first:last]
        return self._rows_of(split).stored(first, last)

    def _shuffled(self, split: str, seed: int, epoch: int, offset: int) -> Iterable[Record]:
        if self._in_memory(split):
            records = self._load_share(split)
            return (records[row] for row in self._order(split, seed, epoch)[offset:])
        rows = self._rows_of(split)
        if rows.random_access:
            share = contract.shuffled_share(rows.count, seed, epoch, self._host, self._hosts)
            return rows.take(share[offset:])
        return self._stream(rows, seed, epoch, offset)

    def _selected(self, split: str, rows: Sequence[int]) -> Iterable[Record]:
        """Returns any rows: from memory if the split is held there, else from the files."""
        if split in self._subset:
            return _lazy_rows(lambda: self._load_subset(split), rows)
        stored = self._rows_of(split)
        if self._in_memory(split):
            return _lazy_rows(lambda: self._load_split(split), rows)
        return stored.take(rows)

    def _share(self, split: str) -> int:
        return self.count(split) // self._hosts

    def _order(self, split: str, seed: int, epoch: int) -> np.ndarray:
        """Returns i64[share], a permutation of the cached records for an epoch."""
        word = seed_words(seed, epoch, self._host)[0] >> np.uint64(1)
        return np.random.default_rng(int(word)).permutation(self._share(split))

    def _in_memory(self, split: str) -> bool:
        """Returns whether the records of a split are held in memory."""
        if self._cache or split in self._subset:
            return True
        size = self._builder.info.splits[re.split(r"[\[+]", split)[0]].num_bytes
        return 0 < size <= _MAX_CACHED_BYTES

    def _load_share(self, split: str) -> list[Record]:
        """Returns this host's share of a split, read once."""
        if split not in self._share_records:
            share = self._share(split)
            records = self._stored(split, self._host * share, (self._host + 1) * share)
            self._share_records[split] = list(records)
        return self._share_records[split]

    def _load_split(self, split: str) -> list[Record]:
        """Returns all records of a split in the stored order, read once."""
        if self._hosts == 1:
            return self._load_share(split)
        if split not in self._all_records:
            self._all_records[split] = list(self._stored(split, 0, self.count(split)))
        return self._all_records[split]

    def _load_subset(self, split: str) -> list[Record]:
        """Returns the records of the subset of a split, located by file name once."""
        if split not in self._subset_records:
            names = self._subset[split]
            by_name = {text: r for text, r in self._rows_of(split).iter_named() if text in names}
            if missing := sorted(names - by_name.keys()):
                raise UserError(
                    f"{len(missing)} of {len(names)} file names of config.data.subset are not in "
                    f"the split {split!r} of {self.name}, e.g. {missing[0]!r}."
                )
            self._subset_rows[split] = [record.row for record in by_name.values()]
            self._subset_records[split] = [
                record._replace(row=i) for i, record in enumerate(by_name.values())
            ]
        return self._subset_records[split]

    def _stream(self, rows: Rows, seed: int, epoch: int, offset: int) -> Iterator[Record]:
        """Yields this host's records of an epoch from TFRecord files, group by group.

        Resuming in the middle of an epoch reads at most one group twice.
        """
        groups = list(self._ordered_groups(rows, seed, epoch, offset))
        with ThreadPoolExecutor(1) as reader:
            pending = [reader.submit(rows.mixed, runs) for _, runs, _ in groups[:1]]
            for number, (_, _, order) in enumerate(groups):
                records = pending.pop().result()
                pending = [reader.submit(rows.mixed, r) for _, r, _ in groups[number + 1 :][:1]]
                yield from (records[i] for i in order)

    def _ordered_groups(
        self, rows: Rows, seed: int, epoch: int, offset: int
    ) -> Iterator[tuple[int, list[tuple[int, int]], np.ndarray]]:
        """Yields the groups of an epoch from the one with position `offset` on.

        Each item has the position of the first record, the runs of rows of the group, and the
        order in which its records are used; of the first group, the order from `offset` on.
        """
        position = 0
        for number, runs in enumerate(self._groups(rows, seed, epoch)):
            count = sum(last - first for first, last in runs)
            if offset < position + count:
                shuffled = np.random.default_rng(seed_words(seed, epoch, self._host, number))
                begin = max(offset - position, 0)
                yield position + begin, runs, shuffled.permutation(count)[begin:]
            position += count

    def _groups(self, rows: Rows, seed: int, epoch: int) -> Iterator[list[tuple[int, int]]]:
        """Yields groups of row ranges that are shuffled together; all hosts use one file order.

        Each epoch orders the files anew and cuts this order where the host's share begins and
        ends, so a host reads the same number of records in each epoch but different ones. Two
        groups are in memory at a time.
        """
        share = rows.count // self._hosts
        first, last = self._host * share, (self._host + 1) * share
        files = np.random.default_rng(seed_words(seed, epoch)).permutation(len(rows.runs))
        group, num_records, position = [], 0, 0
        for start, end in rows.runs[files].tolist():
            low, high = max(first - position, 0), min(last - position, end - start)
            position += end - start
            if low < high:
                group.append((start + low, start + high))
                num_records += high - low
            if group and 2 * num_records >= self._shuffle_buffer:
                yield group
                group, num_records = [], 0
        if group:
            yield group

    @contextlib.contextmanager
    def _cropper(
        self,
        split: str,
        views: Mapping[int, Any],
        seed: int,
        batch_size: int,
        start: contract.Position,
    ) -> Iterator[CropEpoch]:
        if self._reader != "tfdata":
            with super()._cropper(split, views, seed, batch_size, start) as crop_epoch:
                yield crop_epoch
            return
        share = self._share(split)

        def crop_one(position):
            seeds = (seed, position.epoch, self._host)
            shuffled = self._shuffled(split, seed, *dataclasses.astuple(position))
            with contextlib.closing(iter(shuffled)) as records:
                record = next(records)
            file = decode.ruled(record.file, self._rules)
            return record, decode.crops_of([file], views, seeds, position.offset)[0]

        draws = tfdata.Draws(views, seed, self._host)
        images = functools.partial(self._encoded_images, split, draws)
        cropper = tfdata.Cropper(
            views, self._rules, images, crop_one, share, chunks_ahead(batch_size)
        )
        with contextlib.closing(cropper.iterate(start)) as cropped:
            yield lambda epoch, offset: itertools.islice(cropped, share - offset)

    def _encoded_images(self, split: str, draws: tfdata.Draws, start: contract.Position) -> Any:
        """Returns a tf.data pipeline of this host's `tfdata.Images` from a position on."""
        if self._in_memory(split) or self._rows_of(split).random_access:
            return tfdata.fed(draws, start, functools.partial(self._shuffled, split, draws.seed))
        rows = self._rows_of(split)

        def groups():
            offset = start.offset
            for epoch in itertools.count(start.epoch):
                for first, runs, order in self._ordered_groups(rows, draws.seed, epoch, offset):
                    yield contract.Position(epoch, first), rows.parts(runs), order
                offset = 0

        return tfdata.grouped(draws, groups(), rows.dataset)

    def _train(self, split, share, views, batch_size, seed, start, limit):
        if self._reader == "threads" and self._crops_by_batch(split, views):
            return self._train_small(split, share, views, batch_size, seed, start, limit)
        return super()._train(split, share, views, batch_size, seed, start, limit)

    def _crops_by_batch(self, split, views) -> bool:
        """Returns whether the images of a split are cached decoded and cropped by batch."""
        shape = self._builder.info.features[self._image].shape
        fixed = None not in shape and shape[0] * shape[1] <= _MAX_BATCHED_PIXELS
        exact = all(crop.antialias != "area" for crop in views.values())
        return fixed and exact and self._in_memory(split)

    def _train_small(self, split, share, views, batch_size, seed, start, limit):
        """Yields batches of crops of small images of one size, cached decoded."""
        pixels, readable = self._decode_share(split, limit)
        labels = np.array([record.label for record in self._load_share(split)], np.int32)
        for epoch in itertools.count(start.epoch):
            offset = start.offset if epoch == start.epoch else 0
            order = self._order(split, seed, epoch)
            positions = np.arange(offset, share)
            positions = positions[readable[order[positions]]]
            for first in range(0, len(positions) - batch_size + 1, batch_size):
                batch = positions[first : first + batch_size]
                cropped = {
                    view: _crop_batch(
                        pixels[order[batch]], batch, crop, (seed, epoch, self._host, view)
                    )
                    for view, crop in views.items()
                }
                after = contract.next_position(epoch, int(batch[-1]) + 1, share, batch_size)
                rows = self._host * share + order[batch]
                yield contract.HostBatch(cropped, {}, after, labels[order[batch]], rows)
            if not offset and len(positions) < batch_size:
                contract.check_batch_size(self.name, split, 0, batch_size)

    def _decode_share(self, split: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Decodes this host's share once; returns u8[n, H, W, 3 or 1] and the readable mask."""
        if split not in self._share_pixels:
            height, width, channels = self._builder.info.features[self._image].shape
            records = self._load_share(split)
            # Greyscale images keep one channel, for a third of the memory and the work.
            pixels = np.zeros((len(records), height, width, min(channels, 3)), np.uint8)
            readable = np.ones(len(records), bool)
            for i, record in enumerate(records):
                try:
                    pixels[i] = decode.decode(decode.ruled(record.file, self._rules))[
                        ..., : pixels.shape[-1]
                    ]
                except decode.Unreadable as error:
                    readable[i] = False
                    self._skip(split, record, error, limit)
            self._share_pixels[split] = pixels, readable
        return self._share_pixels[split]


def _lazy_rows(load: Callable[[], list[Record]], rows: Sequence[int]) -> Iterator[Record]:
    """Yields rows of records that are loaded into memory when the first row is requested."""
    records = load()
    yield from (records[row] for row in rows)


def _crop_batch(images, positions, crop, seeds):
    """Crops one view of a batch of small images of one size to u8[b, S, S, 3]."""
    first = int(positions[0])
    draws = crops.uniforms(*seeds, first, int(positions[-1]) + 1 - first)[positions - first]
    height, width = (np.full(len(images), side) for side in images.shape[1:3])
    boxes = crops.boxes(draws, height, width, crop.scale, crop.ratio)
    cropped = crops.cut(images, boxes, crop.size, crop.interpolation, crop.antialias == "exact")
    return np.broadcast_to(cropped, (*cropped.shape[:3], 3))


def _image_and_label(info):
    """Returns the names of the image and label features; "" if there is no label."""
    _, tfds = tensorflow()
    images = [k for k, f in info.features.items() if isinstance(f, tfds.features.Image)]
    if not images:
        raise UserError(f"{info.name} has no image feature; it has: {', '.join(info.features)}.")
    labels = [k for k, f in info.features.items() if isinstance(f, tfds.features.ClassLabel)]
    supervised = info.supervised_keys[1] if info.supervised_keys else None
    label = supervised if supervised in labels else (labels or [""])[0]
    return images[0], label
