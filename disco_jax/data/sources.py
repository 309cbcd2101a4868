"""Prepared TFDS data sets: records by tf.data or array_record, pictures by threads.

TensorFlow is imported where it is used, so that this module costs nothing until a data set is
opened. Nothing here ever downloads.
"""

import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from disco_jax.data import base, crops, decode
from disco_jax.data.encoded import EncodedSource, Record
from disco_jax.data.records import Rows, tensorflow
from disco_jax.errors import UserError, did_you_mean, unknown

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_INFO = "dataset_info.json"
_FILE_NAME = "file_name"  # what ImageNet in TFDS calls it
# Splits that take less than this on disk are kept in memory, which shuffles them fully and
# makes the start of an epoch free.
_SMALL_BYTES = 200e6
# Images of one size up to this many pixels are cropped a batch at a time.
_SMALL_PIXELS = 64 * 64


def data_directory(data_dir: str = "") -> epath.Path:
    """Where prepared data sets lie: data_dir, else TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return epath.Path(
        data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    ).expanduser()


def available(data_dir: str = "") -> list[str]:
    """The names of the prepared data sets in a directory, "name" or "name/config"."""
    names, root = [], data_directory(data_dir)
    for folder in sorted(_folders(root)):
        if _versions(folder):
            names.append(folder.name)
        names += [f"{folder.name}/{f.name}" for f in sorted(_folders(folder)) if _versions(f)]
    return names


def find(name: str, data_dir: str = "") -> epath.Path:
    """The version folder of a prepared data set, the highest version where there are several.

    Args:
      name: "name", "name/config", or the path of a version folder itself.
      data_dir: see `data_directory`.

    Raises:
      UserError: says what is there and how to prepare what is not.
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
        how = (
            "put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, which image-net.org gives "
            f"to registered users, into {root / 'downloads' / 'manual'} and run "
            f"`tfds build {name} --data_dir {root}`"
        )
    else:
        how = f"`tfds build {name or 'NAME'} --data_dir {root}`"
    there = ", ".join(names) if names else "nothing" if root.is_dir() else "no such directory"
    return UserError(
        f"config.data.name={name!r} is not prepared in {root}.{did_you_mean(name, names)} "
        f"There: {there}. To prepare it: {how}. To look elsewhere, set config.data.dir or "
        "TFDS_DATA_DIR."
    )


class TfdsSource(EncodedSource):
    """A `base.Source` over a prepared TFDS data set."""

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
        rules: decode.Rules = decode.DEFAULT_RULES,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Opens a data set; reads only its description.

        Args:
          name: see `find`.
          data_dir: see `data_directory`.
          cache: keep this host's encoded records in memory whatever their size.
          shuffle_buffer: how many encoded records of TFRecord files to hold for mixing.
          subset: split -> the file names to keep of it; found by reading the split once.
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
        self._cache, self._shuffle_buffer = cache, shuffle_buffer
        self._subset = {split: frozenset(names) for split, names in (subset or {}).items()}
        if self._subset and _FILE_NAME not in features:
            raise UserError(
                f"config.data.subset picks records by file name, but those of {self.name} have no "
                f"feature {_FILE_NAME!r}; they have: {', '.join(features)}."
            )
        self._rows: dict[str, Rows] = {}
        self._kept: dict[str, list[Record]] = {}  # split -> encoded records of this host's share
        self._kept_whole: dict[str, list[Record]] = {}  # and of all hosts' shares together
        self._kept_subset: dict[str, list[Record]] = {}  # all of it, which is little
        self._subset_rows: dict[str, list[int]] = {}  # and where in the whole split it lies
        self._kept_pixels: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def splits(self) -> list[str]:
        """The names of the splits."""
        return list(self._builder.info.splits)

    def count(self, split: str) -> int:
        """The number of records of a split, all hosts together."""
        if split in self._subset:
            return len(self._subset[split])
        return self._rows_of(split).count

    def fingerprint(self, split: str) -> dict[str, Any]:
        """Returns version, number of records and lengths of shards; see `base.Source`."""
        rows = self._rows_of(split)
        told = {
            "data set": str(self._builder.info.full_name),
            "records": self.count(split),
            "lengths of shards (CRC-32)": base.checksum([rows.runs.astype("<i8").tobytes()]),
        }
        if split in self._subset:
            names = "\n".join(sorted(self._subset[split]))
            told["names of the subset (CRC-32)"] = base.checksum([os.fsencode(names)])
        return told

    def part(self, split: str, count: int, seed: int) -> str:
        """Records side by side in a split: labels lie beside images, and all would be read.

        Data sets are mixed when they are prepared, so that classes are mixed in any part.
        """
        total = self.count(split)
        if split in self._subset or self._is_small(split) or "[" in split or total <= count:
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
            return self._keep_subset(split)[first:last]
        return self._rows_of(split).stored(first, last)

    def _shuffled(self, split: str, seed: int, epoch: int, offset: int) -> Iterable[Record]:
        if self._is_small(split):
            kept = self._keep(split)
            return (kept[row] for row in self._order(split, seed, epoch)[offset:])
        rows = self._rows_of(split)
        if rows.random_access:
            mine = base.shuffled_share(rows.count, seed, epoch, self._host, self._hosts)
            return rows.chosen(mine[offset:])
        return self._streamed(rows, seed, epoch, offset)

    def _selected(self, split: str, rows: Sequence[int]) -> Iterable[Record]:
        """Any rows: of array_record from the files, else from memory, which must hold them all."""
        if split in self._subset:
            return _picked(lambda: self._keep_subset(split), rows)
        stored = self._rows_of(split)
        if self._is_small(split):
            return _picked(lambda: self._keep_whole(split), rows)
        if stored.random_access:
            return stored.chosen(rows)
        raise UserError(
            f"The split {split!r} of {self.name} in {self._builder.data_path} lies in TFRecord "
            "files, whose records cannot be picked out one by one as bags need it. Prepare it with "
            f"`tfds build {self.name} --file_format=array_record --data_dir NEW` and set "
            "config.data.dir=NEW, or use a folder of pictures (config.data.source='folder'); "
            "config.data.cache=true keeps all its encoded pictures in the memory of every host."
        )

    def _share(self, split: str) -> int:
        return self.count(split) // self._hosts

    def _order(self, split: str, seed: int, epoch: int) -> np.ndarray:
        """i64[share]: the kept records of an epoch."""
        word = base.seed_words(seed, epoch, self._host)[0] >> np.uint64(1)
        return np.random.default_rng(int(word)).permutation(self._share(split))

    def _is_small(self, split: str) -> bool:
        """Whether the records of a split stay in memory."""
        if self._cache or split in self._subset:
            return True
        size = self._builder.info.splits[re.split(r"[\[+]", split)[0]].num_bytes
        return 0 < size <= _SMALL_BYTES

    def _keep(self, split: str) -> list[Record]:
        """This host's share, read once."""
        if split not in self._kept:
            share = self._share(split)
            mine = self._stored(split, self._host * share, (self._host + 1) * share)
            self._kept[split] = list(mine)
        return self._kept[split]

    def _keep_whole(self, split: str) -> list[Record]:
        """All records of a split in the stored order, read once; with one host, its share."""
        if self._hosts == 1:
            return self._keep(split)
        if split not in self._kept_whole:
            self._kept_whole[split] = list(self._stored(split, 0, self.count(split)))
        return self._kept_whole[split]

    def _keep_subset(self, split: str) -> list[Record]:
        """The records of a subset, found by their names."""
        if split not in self._kept_subset:
            names = self._subset[split]
            found = {text: r for text, r in self._rows_of(split).told_apart() if text in names}
            if missing := sorted(names - found.keys()):
                raise UserError(
                    f"{len(missing)} of {len(names)} file names of config.data.subset are not in "
                    f"the split {split!r} of {self.name}, {missing[0]!r} for one."
                )
            self._subset_rows[split] = [record.row for record in found.values()]
            self._kept_subset[split] = [
                record._replace(row=i) for i, record in enumerate(found.values())
            ]
        return self._kept_subset[split]

    def _streamed(self, rows: Rows, seed: int, epoch: int, offset: int) -> Iterator[Record]:
        """This host's records of an epoch from TFRecord files, group after group.

        Reading on in the middle of an epoch costs at most one group.
        """
        groups = list(self._groups(rows, seed, epoch))
        counts = [sum(last - first for first, last in group) for group in groups]
        begins = np.cumsum([0, *counts])
        first = int(np.searchsorted(begins[1:], offset, side="right"))
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(rows.mixed, groups[first]) if first < len(groups) else None
            for number in range(first, len(groups)):
                assert ahead is not None  # a group is left
                records = ahead.result()
                if number + 1 < len(groups):
                    ahead = reader.submit(rows.mixed, groups[number + 1])
                shuffled = np.random.default_rng(base.seed_words(seed, epoch, self._host, number))
                order = shuffled.permutation(len(records))
                yield from (records[i] for i in order[max(offset - int(begins[number]), 0) :])

    def _groups(self, rows: Rows, seed: int, epoch: int) -> Iterator[list[tuple[int, int]]]:
        """Runs of rows that are mixed together: whole files, in an order that hosts share.

        A host has the same number of records in each epoch, but other ones: the files, in a new
        order, are cut where its share begins and ends. Two groups are in memory at a time.
        """
        share = rows.count // self._hosts
        first, last = self._host * share, (self._host + 1) * share
        files = np.random.default_rng(base.seed_words(seed, epoch)).permutation(len(rows.runs))
        group, size, at = [], 0, 0
        for begin, end in rows.runs[files].tolist():
            low, high = max(first - at, 0), min(last - at, end - begin)
            at += end - begin
            if low < high:
                group.append((begin + low, begin + high))
                size += high - low
            if group and 2 * size >= self._shuffle_buffer:
                yield group
                group, size = [], 0
        if group:
            yield group

    def _train(self, split, share, views, batch_size, seed, start, limit):
        if self._has_pixels(split, views):
            return self._small(split, share, views, batch_size, seed, start, limit)
        return super()._train(split, share, views, batch_size, seed, start, limit)

    def _has_pixels(self, split, views) -> bool:
        """Whether the images of a split are kept decoded, to be cropped a batch at a time."""
        shape = self._builder.info.features[self._image].shape
        fixed = None not in shape and shape[0] * shape[1] <= _SMALL_PIXELS
        exact = all(crop.antialias != "area" for crop in views.values())
        return fixed and exact and self._is_small(split)

    def _small(self, split, share, views, batch_size, seed, start, limit):
        """Batches of crops of small images of one size."""
        pixels, readable = self._keep_pixels(split, limit)
        labels = np.array([record.label for record in self._keep(split)], np.int32)
        for epoch in itertools.count(start.epoch):
            offset = start.offset if epoch == start.epoch else 0
            order = self._order(split, seed, epoch)
            positions = np.arange(offset, share)
            positions = positions[readable[order[positions]]]
            for begin in range(0, len(positions) - batch_size + 1, batch_size):
                batch = positions[begin : begin + batch_size]
                cut = {
                    view: _cut(pixels[order[batch]], batch, crop, (seed, epoch, self._host, view))
                    for view, crop in views.items()
                }
                after = base.next_position(epoch, int(batch[-1]) + 1, share, batch_size)
                rows = self._host * share + order[batch]
                yield base.HostBatch(cut, {}, after, labels[order[batch]], rows)
            if not offset and len(positions) < batch_size:
                base.check_batch_size(self.name, split, 0, batch_size)

    def _keep_pixels(self, split: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """This host's share, decoded once: u8[n, H, W, 3 or 1], and bool[n], what is readable."""
        if split not in self._kept_pixels:
            height, width, channels = self._builder.info.features[self._image].shape
            kept = self._keep(split)
            # One channel where images are grey: a third of the memory and of the work.
            pixels = np.zeros((len(kept), height, width, min(channels, 3)), np.uint8)
            readable = np.ones(len(kept), bool)
            for i, record in enumerate(kept):
                try:
                    pixels[i] = decode.decode(decode.ruled(record.file, self._rules))[
                        ..., : pixels.shape[-1]
                    ]
                except decode.Unreadable as error:
                    readable[i] = False
                    self._skip(split, record, error, limit)
            self._kept_pixels[split] = pixels, readable
        return self._kept_pixels[split]


def _picked(keep: Callable[[], list[Record]], rows: Sequence[int]) -> Iterator[Record]:
    """Rows of what is kept in memory, read when the first of them is asked for."""
    kept = keep()
    yield from (kept[row] for row in rows)


def _cut(images, positions, crop, where):
    """One view of a batch of small images of one size, u8[b, S, S, 3]."""
    first = int(positions[0])
    draws = crops.uniforms(*where, first, int(positions[-1]) + 1 - first)[positions - first]
    height, width = (np.full(len(images), side) for side in images.shape[1:3])
    places = crops.boxes(draws, height, width, crop.scale, crop.ratio)
    made = crops.cut(images, places, crop.size, crop.interpolation, crop.antialias == "exact")
    return np.broadcast_to(made, (*made.shape[:3], 3))


def _image_and_label(info):
    """The names of the features to read; the label's is "" where there is none."""
    _, tfds = tensorflow()
    images = [k for k, f in info.features.items() if isinstance(f, tfds.features.Image)]
    if not images:
        raise UserError(f"{info.name} has no image feature; it has: {', '.join(info.features)}.")
    labels = [k for k, f in info.features.items() if isinstance(f, tfds.features.ClassLabel)]
    supervised = info.supervised_keys[1] if info.supervised_keys else None
    label = supervised if supervised in labels else (labels or [""])[0]
    return images[0], label
