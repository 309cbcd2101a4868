"""Prepared TFDS data sets, decoded and cropped on the host by tf.data.

TensorFlow is imported where it is used, so that this module costs nothing until a data set is
opened. Nothing here ever downloads.
"""

import functools
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from disco_jax.data import base
from disco_jax.errors import UserError, did_you_mean, unknown

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_INFO = "dataset_info.json"
_METHODS = ("bilinear", "bicubic")
# Splits that take less than this on disk are kept in memory, which shuffles them fully and
# makes the start of an epoch free.
_SMALL_BYTES = 200e6


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
        _, tfds = _tensorflow()
        self._builder = tfds.builder_from_directory(os.fspath(folder))
        self.name = self._builder.info.name
        self._image, self._label = _image_and_label(self._builder.info)
        feature = self._builder.info.features.get(self._label)
        self.num_classes = getattr(feature, "num_classes", None)
        self.unreadable: list[str] = []
        self._cache, self._shuffle_buffer = cache, shuffle_buffer
        self._max_unreadable = max_unreadable
        self._host, self._hosts = process_index, process_count
        self._kept: dict[str, Any] = {}  # split -> string[N], this host's encoded images

    def count(self, split: str) -> int:
        """The number of records of a split, all hosts together."""
        splits = self._builder.info.splits
        if re.split(r"[\[+]", split)[0] not in splits:
            raise unknown(f"The split of {self.name}", split, splits)
        return splits[split].num_examples

    def train(
        self,
        split: str,
        crops: Mapping[int, Any],
        batch_size: int,
        seed: int,
        start: base.Position,
        max_unreadable: int,
    ) -> Iterator[base.HostBatch]:
        """Random resized crops of shuffled images, without end; see `base.Source`."""
        for crop in crops.values():
            _check_method("config.augment.interpolation", crop.interpolation)
        share = self.count(split) // self._hosts
        base.check_batch_size(self.name, split, share, batch_size)
        views, decode = list(crops), _crop_function(tuple(crops.values()))

        def batches():
            for epoch in itertools.count(start.epoch):
                offset = start.offset if epoch == start.epoch else 0
                order = _Order(self, split, seed, epoch)
                key = int(base.seed_words(seed, epoch, self._host, words=1)[0] >> 1)
                records = order.images(offset)
                cropped = _decoded(records, functools.partial(decode, key), batch_size, offset)
                readable = 0
                for positions, images in self._named(
                    cropped, order, offset, share, max_unreadable
                ):
                    if len(positions) < batch_size:
                        continue
                    readable += 1
                    after = int(positions[-1]) + 1
                    after = base.next_position(epoch, after, share, batch_size)
                    yield base.HostBatch(dict(zip(views, images, strict=True)), {}, after)
                if not (offset or readable):
                    base.check_batch_size(self.name, split, 0, batch_size)

        return batches()
