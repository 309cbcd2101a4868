"""In-memory images from arrays and .npz files, without TensorFlow.

Every host holds the whole data set and reads its own share of the shuffle of each epoch.
"""

import contextlib
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from disco_jax.data import contract
from disco_jax.data.crops import boxes, uniforms
from disco_jax.data.decode import evaluated, resize
from disco_jax.data.encoded import check_crops
from disco_jax.data.skips import Skipped, UnreadableNames
from disco_jax.errors import UserError, unknown

_THREADS = min(8, os.cpu_count() or 1)
# Below this number of pixels, cropping an image costs less than passing it to another thread.
_MIN_THREADED_PIXELS = 96 * 96

Images = np.ndarray | Sequence[np.ndarray]


class ArraySource:
    """A `contract.Source` over arrays in memory."""

    def __init__(
        self,
        splits: Mapping[str, tuple[Images, Any]],
        *,
        name: str = "arrays",
        num_classes: int | None = None,
        unreadable: Sequence[str] = (),
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Wraps the arrays without copying them.

        Args:
          splits: split -> (images, labels). Images are u8[N, H, W], u8[N, H, W, 1 or 3] or a
            list of u8[H, W] and u8[H, W, 3]. Labels are int[N] or int[N, 1] with -1 for
            unlabelled images, or None.
          name: name of the data set for messages.
          num_classes: number of classes; by default the largest label + 1, or None if no image
            has a label.
          unreadable: names of records that were left out because they are unreadable.
          process_index: index of this host.
          process_count: number of hosts that share the records.

        Raises:
          UserError: there is no split, or its images or labels have a wrong type or shape.
        """
        if not splits:
            raise UserError(f"{name} has no split.")
        self.name = name
        self.unreadable = UnreadableNames(unreadable)
        self.skipped = Skipped()
        self.class_names: Sequence[str] = ()
        self._splits = {split: _checked(name, split, *pair) for split, pair in splits.items()}
        largest = max(labels.max(initial=-1) for _, labels in self._splits.values())
        self.num_classes = num_classes or int(largest) + 1 or None
        self._host, self._hosts = process_index, process_count

    @classmethod
    def from_npz(cls, path: str | os.PathLike, **kwargs) -> "ArraySource":
        """Loads `train_images`, `train_labels`, `test_images`, ... from an .npz file.

        Arrays with other names are ignored and listed in `skipped`.

        Args:
          path: path of the file; the labels of a split may be missing.
          **kwargs: arguments of the constructor.

        Raises:
          UserError: the file does not exist or has no image array, or its images or labels have
            a wrong type or shape.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise UserError(f"There is no file {path}; config.data.dir names the .npz to read.")
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {key: stored[key] for key in stored.files}
        except Exception as error:
            raise UserError(f"{path} cannot be read as an .npz file: {error}") from error
        splits = [key.removesuffix("_images") for key in arrays if key.endswith("_images")]
        if not splits:
            raise UserError(
                f"{path} has no array named like train_images; it has: {', '.join(arrays) or '-'}."
            )
        pairs = {n: (arrays[f"{n}_images"], arrays.get(f"{n}_labels")) for n in splits}
        source = cls(pairs, **{"name": path.stem, **kwargs})
        for key in arrays.keys() - {f"{n}_{kind}" for n in splits for kind in ("images", "labels")}:
            source.skipped.add("named neither SPLIT_images nor SPLIT_labels", key)
        return source

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return list(self._splits)

    def count(self, split: str) -> int:
        """Returns the number of records of a split over all hosts."""
        return len(self._split(split)[0])

    def fingerprint(self, split: str) -> dict[str, Any]:
        """Returns the number of images and a checksum of all values; see `contract.Source`."""
        images, labels = self._split(split)
        blocks = [images] if isinstance(images, np.ndarray) else images
        values = (np.ascontiguousarray(block).reshape(-1).data for block in (*blocks, labels))
        return {
            "images": len(images),
            "pixels and labels (CRC-32)": contract.checksum(
                memoryview(value).cast("B") for value in values
            ),
        }

    def iter_images(self, split: str) -> Iterator[tuple[str, np.ndarray, int]]:
        """Yields (name, image, label or -1) of every record in the stored order."""
        return self.take(split, range(self.count(split)))

    def take(self, split: str, rows: Sequence[int]) -> Iterator[tuple[str, np.ndarray, int]]:
        """Yields selected records like `iter_images`, in the order of `rows`."""
        images, labels = self._split(split)
        return ((f"record {row}", images[row], int(labels[row])) for row in rows)

    def part(self, split: str, count: int, seed: int) -> str:
        """Returns `split`, whose labels are in memory."""
        return split

    def train(
        self,
        split: str,
        views: Mapping[int, Any],
        batch_size: int,
        seed: int,
        start: contract.Position,
        max_unreadable: int,
    ) -> contract.Batches:
        """Yields batches of random resized crops of shuffled images; see `contract.Source`."""
        check_crops(views)
        contract.report_unreadable(self.name, self.unreadable, [], max_unreadable)
        images, labels = self._split(split)
        share = len(images) // self._hosts
        contract.check_batch_size(self.name, split, share, batch_size)
        return self._train(images, labels, share, views, batch_size, seed, start)

    def _train(self, images, labels, share, views, batch_size, seed, start):
        offset = start.offset
        with _map_function(images, max(crop.size for crop in views.values())) as run:
            for epoch in itertools.count(start.epoch):
                order = contract.shuffled_share(len(images), seed, epoch, self._host, self._hosts)
                for first in range(offset, share - batch_size + 1, batch_size):
                    rows = order[first : first + batch_size]
                    batch_images = [images[i] for i in rows]
                    crops = {
                        view: crop_all(
                            batch_images, crop, (seed, epoch, self._host, view, first), run
                        )
                        for view, crop in views.items()
                    }
                    after = contract.next_position(epoch, first + batch_size, share, batch_size)
                    yield contract.HostBatch(crops, {}, after, labels[rows], rows)
                offset = 0

    def evaluate(
        self,
        split: str,
        size: int,
        resize: int,
        interpolation: str,
        batch_size: int,
        limit: int = 0,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields the center crop of every image once, in order; see `contract.Source`."""
        contract.check_evaluation(size, resize)
        images, labels = self._split(split)
        return self._evaluate(images, labels, size, resize, interpolation, batch_size, limit)

    def _evaluate(self, images, labels, size, resize, interpolation, batch_size, limit):
        first = self._host * len(images) // self._hosts
        share = (self._host + 1) * len(images) // self._hosts - first
        last = first + contract.share_of_limit(limit, share, self._host, self._hosts)
        batches = contract.evaluation_batches(len(images), limit, batch_size, self._hosts)

        def crop_row(index):
            return evaluated(images[index], size, resize, interpolation)

        with _map_function(images, max(size, resize)) as run:
            for start in range(first, first + batches * batch_size, batch_size):
                end = max(start, min(start + batch_size, last))
                out = np.zeros((end - start, size, size, 3), np.uint8)
                cropped = run(crop_row, range(start, end))
                for row, image in enumerate(cropped):
                    out[row] = image
                yield contract.padded(out, labels[start:end], batch_size)

    def _split(self, split):
        if split not in self._splits:
            raise unknown(f"The split of {self.name}", split, self._splits)
        return self._splits[split]


def crop_all(images, crop, seeds, run):
    """Crops one view of a batch of images.

    Args:
      images: b arrays u8[H, W] or u8[H, W, 3].
      crop: an object with the fields of `views.Crop`.
      seeds: (seed, epoch, host, view, position of the first image), which determine the boxes.
      run: the builtin `map` or the `map` of a thread pool.

    Returns:
      u8[b, S, S, 3].
    """
    heights, widths = np.array([image.shape[:2] for image in images]).T
    draws = uniforms(*seeds, len(images))
    crop_boxes = boxes(draws, heights, widths, crop.scale, crop.ratio)
    out = np.empty((len(images), crop.size, crop.size, 3), np.uint8)

    def crop_row(row):
        top_edge, left_edge, height, width = crop_boxes[row]
        cut = images[row][top_edge : top_edge + height, left_edge : left_edge + width]
        out[row] = resize(cut, crop.size, crop.size, crop.interpolation, crop.antialias)

    for _ in run(crop_row, range(len(images))):
        pass
    return out


@contextlib.contextmanager
def _map_function(images, size):
    """Yields a map over rows, threaded if the images or crops are large enough to benefit."""
    if (
        size * size < _MIN_THREADED_PIXELS
        and max(image.shape[0] * image.shape[1] for image in images) < _MIN_THREADED_PIXELS
    ):
        yield map
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        yield pool.map


def _checked(name, split, images, labels):
    """Validates a split and returns (images, i32[N] labels)."""
    description = f"The split {split!r} of {name}"
    if isinstance(images, np.ndarray) and images.ndim == 0:
        raise UserError(f"{description} is a single number, not an array of images.")
    if len(images) == 0:
        raise UserError(f"{description} has no images.")
    if isinstance(images, np.ndarray) and images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    for image in [images[0]] if isinstance(images, np.ndarray) else images:
        grey_or_rgb = image.ndim == 2 or (image.ndim == 3 and image.shape[-1] == 3)
        if image.dtype != np.uint8 or not grey_or_rgb:
            raise UserError(
                f"{description} has an image of type {image.dtype} and shape {image.shape}; images "
                "must be uint8 of shape [H, W] or [H, W, 3], with values from 0 to 255."
            )
        if 0 in image.shape:
            raise UserError(
                f"{description} has an image of shape {image.shape}, which has no pixels."
            )
    return images, _labels(description, len(images), labels)


def _labels(description: str, count: int, labels: Any) -> np.ndarray:
    """Validates labels and returns i32[count], all -1 if `labels` is None."""
    if labels is None:
        return np.full(count, -1, np.int32)
    labels = np.asarray(labels)
    if labels.shape == (count, 1):  # the layout of MedMNIST
        labels = labels[:, 0]
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{description} has {count} images, but labels of type {labels.dtype} and shape "
            f"{labels.shape}; labels must be integers, one per image."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or high >= contract.MAX_CLASSES:
        raise UserError(
            f"{description} has the label {low if low < -1 else high}; labels must lie in 0 to "
            f"{contract.MAX_CLASSES - 1}, or be -1 for unlabelled images."
        )
    return labels.astype(np.int32)
