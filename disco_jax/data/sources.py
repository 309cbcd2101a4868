"""Prepared TFDS data sets, decoded and cropped on the host by tf.data.

TensorFlow is imported where it is used, so that this module costs nothing until a data set is
opened. Nothing here ever downloads.
"""

import contextlib
import functools
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from disco_jax.data import base, crops, decode
from disco_jax.data.decode import tensorflow
from disco_jax.errors import UserError, did_you_mean, unknown

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_INFO = "dataset_info.json"
_METHODS = ("bilinear", "bicubic")
_READ_AT_ONCE = 1024  # records handed over by TensorFlow together
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


class TfdsSource:
    """A `base.Source` over a prepared TFDS data set."""

    def __init__(
        self,
        name: str,
        data_dir: str = "",
        *,
        cache: bool = False,
        shuffle_buffer: int = 16_384,
        max_unreadable: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Opens a data set; reads only its description.

        Args:
          name: see `find`.
          data_dir: see `data_directory`.
          cache: keep this host's encoded records in memory whatever their size.
          shuffle_buffer: how many encoded records to mix where they are not kept in memory.
          max_unreadable: how many records `evaluate` may skip.
          process_index: of this host.
          process_count: hosts that share the records.
        """
        folder = find(name, data_dir)
        _, tfds = tensorflow()
        self._builder = tfds.builder_from_directory(os.fspath(folder))
        self.name = self._builder.info.name
        self._image, self._label = _image_and_label(self._builder.info)
        features = self._builder.info.features
        self.num_classes = features[self._label].num_classes if self._label else None
        self.unreadable: list[str] = []
        self._cache, self._shuffle_buffer = cache, shuffle_buffer
        self._max_unreadable = max_unreadable
        self._host, self._hosts = process_index, process_count
        self._kept: dict[str, Any] = {}  # split -> this host's encoded images and labels
        self._kept_names: dict[str, list[bytes]] = {}
        self._kept_pixels: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def splits(self) -> list[str]:
        """The names of the splits."""
        return list(self._builder.info.splits)

    def count(self, split: str) -> int:
        """The number of records of a split, all hosts together."""
        splits = self._builder.info.splits
        if re.split(r"[\[+]", split)[0] not in splits:
            raise unknown(f"The split of {self.name}", split, splits)
        return splits[split].num_examples

    def _is_small(self, split: str) -> bool:
        """Whether the records of a split stay in memory."""
        if self._cache:
            return True
        size = self._builder.info.splits[re.split(r"[\[+]", split)[0]].num_bytes
        return 0 < size <= _SMALL_BYTES

    def _keep(self, split: str) -> tuple[Any, Any]:
        """This host's share, read once: tensors of encoded images and of labels."""
        if split not in self._kept:
            tf, _ = tensorflow()
            images, labels = self._read_share(split)
            self._kept[split] = tf.constant(images), tf.constant(labels)
        return self._kept[split]

    def _keep_names(self, split: str) -> list[bytes]:
        """The names of this host's share, read when the first is asked for."""
        if split not in self._kept_names:
            (names,) = self._read_share(split, names=True)
            self._kept_names[split] = names.tolist()
        return self._kept_names[split]

    def _read_share(self, split: str, **what: bool) -> list[np.ndarray]:
        """What `_records` yields of this host's share in the stored order, each as one array."""
        records = self._records(split, None, sharded=True, **what)
        with self._readable(split):
            batches = list(records.batch(_READ_AT_ONCE).as_numpy_iterator())
        found = sum(len(batch[0]) for batch in batches)
        self._check_count(split, found, self.count(split) // self._hosts)
        return [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]

    @contextlib.contextmanager
    def _readable(self, split: str) -> Iterator[None]:
        """Turns TensorFlow's error about a damaged file into one that names the data set."""
        tf, _ = tensorflow()
        try:
            yield
        except tf.errors.DataLossError as error:
            raise UserError(
                f"A file of the split {split!r} of {self.name} in {self._builder.data_path} is "
                f"damaged ({error.message}); prepare the data set again."
            ) from error

    def _check_count(self, split: str, found: int, wanted: int) -> None:
        """Raises UserError when the files hold fewer records than their description says."""
        if found < wanted:
            raise UserError(
                f"The files of the split {split!r} of {self.name} in {self._builder.data_path} "
                f"lack {wanted - found} of {wanted} records; prepare the data set again."
            )

    def _records(
        self,
        split: str,
        shuffle_seed: int | None,
        *,
        sharded: bool | None = None,
        names: bool = False,
    ):
        """(encoded, label) from the disk, or (name,), which takes longer to make than to read.

        Of this host's share if shuffled or `sharded`, else of all.
        """
        tf, tfds = tensorflow()
        if sharded or (sharded is None and shuffle_seed is not None):
            split = tfds.even_splits(split, n=self._hosts, drop_remainder=True)[self._host]
        options = tf.data.Options()
        options.deterministic = True
        wanted = {key: True for key in (self._image, self._label) if key}
        records = self._builder.as_dataset(
            split=split,
            shuffle_files=shuffle_seed is not None,
            decoders=tfds.decode.PartialDecoding(
                wanted, decoders={self._image: tfds.decode.SkipDecoding()}
            ),
            # Its error for too few records comes again at every read, so that `ignore_errors` would
            # never end; `TfdsSource._named` counts instead.
            read_config=tfds.ReadConfig(
                shuffle_seed=shuffle_seed,
                add_tfds_id=names,
                try_autocache=False,
                options=options,
                assert_cardinality=False,
                enable_ordering_guard=False,  # shuffling an ordered data set is what we are for
            ),
        )
        if names:
            return records.map(lambda record: (record["tfds_id"],))
        return records.map(
            lambda record: (
                record[self._image],
                tf.cast(record[self._label], tf.int64)
                if self._label
                else tf.constant(-1, tf.int64),
            )
        )

    def pictures(self, split: str) -> Iterator[tuple[str, bytes, int]]:
        """(place in the split, encoded image, label or -1) of every record, in the stored order."""
        self.count(split)
        with self._readable(split):
            for position, encoded, label in _Order(self, split, None, 0).everything():
                yield f"record {int(position)}", encoded.numpy(), int(label)

    def train(
        self,
        split: str,
        views: Mapping[int, Any],
        batch_size: int,
        seed: int,
        start: base.Position,
        max_unreadable: int,
    ) -> Iterator[base.HostBatch]:
        """Random resized crops of shuffled images, without end; see `base.Source`."""
        for crop in views.values():
            _check_method("config.augment.interpolation", crop.interpolation)
        share = self.count(split) // self._hosts
        base.check_batch_size(self.name, split, share, batch_size)
        return self._train(split, views, batch_size, seed, start, share, max_unreadable)

    def _train(self, split, views, batch_size, seed, start, share, limit):
        for epoch in itertools.count(start.epoch):
            offset = start.offset if epoch == start.epoch else 0
            order = _Order(self, split, seed, epoch)
            cropped = self._cropped(order, offset, views, (seed, epoch), batch_size)
            read = offset > 0
            for positions, images in self._named(cropped, order, offset, share, limit):
                if len(positions) == batch_size:
                    read = True
                    after = int(positions[-1]) + 1
                    after = base.next_position(epoch, after, share, batch_size)
                    yield base.HostBatch(dict(zip(views, images, strict=True)), {}, after)
            if not read:  # too much is unreadable to fill one batch
                base.check_batch_size(self.name, split, 0, batch_size)

    def _cropped(self, order, offset, views, where, batch_size):
        """(positions i64[b], one u8[b, S, S, 3] a view) a batch."""
        shape = self._builder.info.features[self._image].shape
        if None not in shape and shape[0] * shape[1] <= _SMALL_PIXELS:
            for positions, images in self._small_images(order, offset, batch_size):
                cut = [
                    _cut(images, positions, crop, (*where, self._host, view))
                    for view, crop in views.items()
                ]
                yield positions, [np.broadcast_to(c, (*c.shape[:3], 3)) for c in cut]
        else:
            key = int(base.seed_words(*where, self._host, words=1)[0] >> np.uint64(1))
            function = functools.partial(decode.crop_function(tuple(views.values())), key)
            made = _decoded(order.images(offset), function, batch_size)
            for positions, *images in made.as_numpy_iterator():
                yield positions, images

    def _small_images(self, order, offset, batch_size):
        """(positions i64[b], u8[b, H, W, 3 or 1]) a batch; all of one size."""
        if order.rows is None:
            yield from _pixels(order.images(offset), batch_size)
            return
        pixels, readable = self._keep_pixels(order.split)
        positions = np.arange(offset, len(order.rows))
        positions = positions[readable[order.rows[positions]]]
        for begin in range(0, len(positions), batch_size):
            batch = positions[begin : begin + batch_size]
            yield batch, pixels[order.rows[batch]]

    def _keep_pixels(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """This host's share, decoded once: u8[n, H, W, 3 or 1], and bool[n], what is readable."""
        if split not in self._kept_pixels:
            tf, _ = tensorflow()
            height, width, channels = self._builder.info.features[self._image].shape
            share = self.count(split) // self._hosts
            # One channel where images are grey: a third of the memory and of the work.
            pixels = np.zeros((share, height, width, min(channels, 3)), np.uint8)
            readable = np.zeros(share, bool)
            records = tf.data.Dataset.from_tensor_slices(self._keep(split)).enumerate()
            records = records.map(lambda position, record: (position, *record))
            for rows, images in _pixels(records, _READ_AT_ONCE):
                pixels[rows], readable[rows] = images[..., : pixels.shape[-1]], True
            self._kept_pixels[split] = pixels, readable
        return self._kept_pixels[split]

    def evaluate(
        self,
        split: str,
        size: int,
        resize: int,
        interpolation: str,
        batch_size: int,
        limit: int = 0,
    ) -> Iterator[dict[str, np.ndarray]]:
        """The middle of every image once, in order; see `base.Source`."""
        base.check_evaluation(size, resize)
        _check_method("config.augment.interpolation", interpolation)
        count = self.count(split)
        first = self._host * count // self._hosts
        share = (self._host + 1) * count // self._hosts - first
        last = first + base.share_of_limit(limit, share, self._host, self._hosts)
        batches = base.evaluation_batches(count, limit, batch_size, self._hosts)
        return self._evaluate(
            split, first, last, batches, (size, resize, interpolation), batch_size
        )

    def _evaluate(self, split, first, last, batches, how, batch_size):
        order = _Order(self, split, None, 0)
        records = order.everything().skip(first).take(last - first)
        decoded = _decoded(records, functools.partial(decode.evaluated, *how), batch_size)
        decoded = ((at, (images, labels)) for at, images, labels in decoded.as_numpy_iterator())
        made = 0
        found = self._named(decoded, order, first, last, self._max_unreadable)
        for _, (images, labels) in found:
            made += 1
            yield base.padded(images, labels, batch_size)
        for _ in range(made, batches):
            empty = np.zeros((0, how[0], how[0], 3), np.uint8)
            yield base.padded(empty, np.zeros(0, np.int32), batch_size)

    def _named(self, batches, order, offset, end, limit):
        """Passes batches on and reports the positions that are missing between them."""
        expected = offset
        for positions, arrays in batches:
            missing = np.setdiff1d(np.arange(expected, positions[-1] + 1), positions)
            expected = int(positions[-1]) + 1
            if len(missing):
                base.report_unreadable(self.name, self.unreadable, order.names(missing), limit)
            yield positions, arrays
        if expected < end:  # bad records after the last good one
            names = order.names(np.arange(expected, end))
            base.report_unreadable(self.name, self.unreadable, names, limit)


class _Order:
    """One host's share of a split, shuffled for an epoch, or in the stored order."""

    def __init__(self, source: TfdsSource, split: str, seed: int | None, epoch: int):
        """A fresh order for each (seed, epoch); seed None keeps the stored order, of all hosts."""
        self._source, self.split, self._shuffled = source, split, seed is not None
        words = base.seed_words(seed or 0, epoch, source._host) >> np.uint64(1)
        self._seeds = [int(word) for word in words]
        if self._shuffled and source._is_small(split):
            share = source.count(split) // source._hosts
            self.rows = np.random.default_rng(self._seeds[0]).permutation(share)
        else:
            self.rows = None

    def images(self, offset: int):
        """(position i64, encoded string, label i64) from the record at `offset` on."""
        tf, _ = tensorflow()
        if self.rows is None:
            return self._read().skip(offset)
        images, labels = self._source._keep(self.split)
        rows = tf.data.Dataset.from_tensor_slices(
            (np.arange(offset, len(self.rows)), self.rows[offset:])
        )
        return rows.map(lambda position, row: (position, images[row], labels[row]))

    def everything(self):
        """(position i64, encoded string, label i64) of the whole split in the stored order."""
        return self._read()

    def names(self, positions: np.ndarray) -> list[str]:
        """What TFDS calls the records at these positions: the file and the number in it."""
        if self.rows is not None:
            names = self._source._keep_names(self.split)
            return [names[self.rows[p]].decode() for p in positions]
        wanted, found = set(map(int, positions)), []
        names = self._read(names=True).skip(int(positions[0]))
        with self._source._readable(self.split):
            for position, name in names.as_numpy_iterator():
                if int(position) in wanted:
                    found.append(name.decode())
                if position >= positions[-1]:
                    break
        self._source._check_count(self.split, len(found), len(wanted))
        return found

    def _read(self, names: bool = False):
        """The records from the disk, (position, *record)."""
        records = self._source._records(
            self.split, self._seeds[0] % 2**31 if self._shuffled else None, names=names
        )
        if self._shuffled:
            records = records.shuffle(
                self._source._shuffle_buffer, seed=self._seeds[1], reshuffle_each_iteration=False
            )
        return records.enumerate().map(lambda position, record: (position, *record))


def _decoded(records, function, batch_size):
    """Batches of what `function` makes of (position, encoded, label); bad records fall out."""
    tf, _ = tensorflow()
    made = records.map(
        lambda position, *record: (position, *function(position, *record)),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    options = tf.data.Options()
    options.deterministic = True
    return made.ignore_errors().batch(batch_size).prefetch(2).with_options(options)


def _pixels(records, batch_size):
    """(positions i64[b], u8[b, H, W, 3]) of whole images of one size, bad ones left out."""
    return _decoded(
        records, lambda p, image, label: [decode.whole(image)], batch_size
    ).as_numpy_iterator()


def _cut(images, positions, crop, where):
    """One view of a batch of small images of one size, u8[b, S, S, 3]."""
    first = int(positions[0])
    draws = crops.uniforms(*where, first, int(positions[-1]) + 1 - first)[positions - first]
    height, width = (np.full(len(images), side) for side in images.shape[1:3])
    places = crops.boxes(draws, height, width, crop.scale, crop.ratio)
    return crops.cut(images, places, crop.size, crop.interpolation, crop.antialias)


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


def _check_method(setting, given):
    if given not in _METHODS:
        raise unknown(setting, given, _METHODS)
