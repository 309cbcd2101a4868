"""Decoding and cropping in tf.data: `config.data.reader="tfdata"`.

The order of the images and the boxes of their crops equal those of the threads in `encoded`: the
uniform draws of each image and view are computed by `crops.uniforms` and passed to the pipeline.
TensorFlow decodes and crops JPEGs and resizes all crops. Images that TensorFlow would read
differently (rotated by EXIF, CMYK, other formats) are decoded by `decode.decode`.
"""

import itertools
import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from disco_jax.data import crops, decode
from disco_jax.data.contract import Position
from disco_jax.data.encoded import THREADS, Chunk, Record, chunked
from disco_jax.data.tensorflow_import import tensorflow

_LOG = logging.getLogger(__name__)

_CHUNK = 16  # images per element that leaves the pipeline
_FEED = 256  # records per element that enters it
_TRIES = crops.TRIES
# Numbers per image and view: area and aspect ratio of each try, (top, left), limits of the ratio.
_NUMBERS = 2 * _TRIES + 4


# Records after their position in the epoch, and their crops; returns the position after them.
Results = Generator[tuple[Chunk, list[decode.Crops]], None, Position]


class Images(NamedTuple):
    """Encoded images of an epoch, in the order of this host: arrays, tensors or their types.

    Attributes:
      epoch: i64[n].
      position: i64[n], positions in this host's epoch.
      row: i64[n], indices in the stored order of the split.
      label: i64[n].
      image: string[n], encoded images.
      numbers: f64[n, V, _NUMBERS], see `Draws.numbers`.
    """

    epoch: Any
    position: Any
    row: Any
    label: Any
    image: Any
    numbers: Any


class Draws(NamedTuple):
    """The random numbers of a host's crops.

    Attributes:
      views: view -> its crop, an object with the fields of `views.Crop`.
      seed: seed of the run.
      host: index of this host.
    """

    views: Mapping[int, Any]
    seed: int
    host: int

    def numbers(self, epoch: int, first: int, count: int) -> np.ndarray:
        """Returns f64[count, V, _NUMBERS], from which `box` computes the boxes of the crops.

        Args:
          epoch: index of the epoch.
          first: position of the first image in this host's epoch.
          count: number of consecutive images.
        """
        out = np.empty((count, len(self.views), _NUMBERS))
        for column, (view, crop) in enumerate(self.views.items()):
            draws = crops.uniforms(self.seed, epoch, self.host, view, first, count)
            area, aspect = draws[:, :_TRIES, 0], draws[:, :_TRIES, 1]
            low, high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
            out[:, column, :_TRIES] = crop.scale[0] + (crop.scale[1] - crop.scale[0]) * area
            out[:, column, _TRIES:-4] = np.exp(low + (high - low) * aspect)
            out[:, column, -4:-2] = draws[:, _TRIES]
            out[:, column, -2:] = crop.ratio
        return out


def box(numbers: Any, height: Any, width: Any) -> Any:
    """Computes the box of a crop in TensorFlow, equal to that of `crops.boxes`.

    All operations are rounded as in NumPy: the exponential, which is not, is in `numbers`.

    Args:
      numbers: f64[_NUMBERS] of one image and view, see `Draws.numbers`.
      height: i64[], height of the image in pixels.
      width: i64[], width of the image in pixels.

    Returns:
      i32[4]: top, left, height, width, in pixels.
    """
    tf, _ = tensorflow()
    areas, aspects = numbers[:_TRIES], numbers[_TRIES:-4]
    top, left_edge, low, high = (numbers[n] for n in range(-4, 0))
    area = tf.cast(height * width, tf.float64) * areas
    height, width = tf.cast(height, tf.float64), tf.cast(width, tf.float64)
    w, h = tf.round(tf.sqrt(area * aspects)), tf.round(tf.sqrt(area / aspects))
    fits = (w > 0) & (h > 0) & (w <= width) & (h <= height)
    any_fit, first_fit = tf.reduce_any(fits), tf.argmax(tf.cast(fits, tf.int32))
    fallback_h = tf.where(width < low * height, tf.round(width / low), height)
    fallback_w = tf.where(width > high * height, tf.round(height * high), width)
    h = tf.where(any_fit, h[first_fit], fallback_h)
    w = tf.where(any_fit, w[first_fit], fallback_w)
    free_h, free_w = height - h, width - w
    y = tf.floor(tf.where(any_fit, top * (free_h + 1), free_h / 2))
    x = tf.floor(tf.where(any_fit, left_edge * (free_w + 1), free_w / 2))
    return tf.cast(tf.stack([y, x, h, w]), tf.int32)


def fed(draws: Draws, start: Position, shuffled: Callable[[int, int], Iterable[Record]]) -> Any:
    """Returns a tf.data pipeline of `Images`, one at a time, from records that Python reads.

    Args:
      draws: random numbers of the crops.
      start: position of the first image.
      shuffled: (epoch, offset) -> this host's records of the epoch from `offset` on.
    """
    tf, _ = tensorflow()

    def elements():
        offset = start.offset
        for epoch in itertools.count(start.epoch):
            for first, records in chunked(offset, shuffled(epoch, offset), _FEED):
                count = len(records)
                rows, files, labels = zip(*records, strict=True)
                positions = np.arange(first, first + count)
                numbers = draws.numbers(epoch, first, count)
                yield Images(np.full(count, epoch), positions, rows, labels, files, numbers)
            offset = 0

    read = tf.data.Dataset.from_generator(elements, output_signature=_signature(draws))
    return read.unbatch()


def grouped(
    draws: Draws,
    groups: Iterable[tuple[Position, tuple, np.ndarray]],
    read: Callable[[tuple], Any],
) -> Any:
    """Returns a tf.data pipeline of `Images`, one at a time, from TFRecord files read by tf.data.

    Args:
      draws: random numbers of the crops.
      groups: position of the first image of each group, the columns of its parts of files (see
        `records.Rows.parts`), and the order in which its records are used. Two groups are read
        ahead.
      read: columns of parts -> a tf.data pipeline of (row, encoded image, label, text).
    """
    tf, _ = tensorflow()

    def elements():
        for start, columns, order in groups:
            count = len(order)
            positions = np.arange(start.offset, start.offset + count)
            numbers = draws.numbers(start.epoch, start.offset, count)
            yield columns, order, np.full(count, start.epoch), positions, numbers

    def shuffled(columns, order, epochs, positions, numbers):
        def ordered(row, image, label, _):
            row, label, image = (tf.gather(column, order) for column in (row, label, image))
            return Images(epochs, positions, row, label, image, numbers)

        return read(columns).batch(tf.reduce_sum(columns[2])).map(ordered)

    whole = tf.TensorSpec([None], tf.int64)
    parts = (tf.TensorSpec([None], tf.string), whole, whole, whole)
    signature = (parts, whole, whole, whole, _signature(draws).numbers)
    read_groups = tf.data.Dataset.from_generator(elements, output_signature=signature)
    return read_groups.flat_map(shuffled).prefetch(1).unbatch()


def _signature(draws: Draws) -> Images:
    tf, _ = tensorflow()
    number, text = tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.string)
    numbers = tf.TensorSpec([None, len(draws.views), _NUMBERS], tf.float64)
    return Images(number, number, number, number, text, numbers)


class Cropper:
    """A reader of the crops of this host's images, epoch after epoch."""

    def __init__(
        self,
        views: Mapping[int, Any],
        rules: decode.Rules,
        images: Callable[[Position], Any],
        crop_one: Callable[[Position], tuple[Record, decode.Crops]],
        share: int,
        ahead: int,
    ):
        """Creates a reader.

        Args:
          views: view -> its crop, an object with the fields of `views.Crop`.
          rules: settings for decoding images.
          images: start -> a tf.data pipeline of `Images`, one at a time.
          crop_one: decodes and crops the image at a position without TensorFlow.
          share: number of images of this host in an epoch.
          ahead: number of chunks of 16 images that are computed in advance.
        """
        self._views, self._rules, self._images = list(views.values()), rules, images
        self._crop_one, self._share, self._ahead = crop_one, share, ahead
        tf, _ = tensorflow()
        self._traced_crop = tf.function(self._crop, autograph=False)  # traced once

    def iterate(self, start: Position) -> Results:
        """Yields each record, without its file, after its position, and its crops."""
        tf, _ = tensorflow()
        position = start
        while True:
            try:
                for record, views in self._run(position, _CHUNK):
                    yield (position.offset, [record]), [views]
                    position = self._after(position)
            except tf.errors.OpError:  # an image is damaged: the error loses its whole chunk
                position = yield from self._singly(position)

    def _singly(self, position: Position) -> Results:
        """Yields a chunk of images that are cropped one by one; returns the position after it.

        An image at which TensorFlow fails is cropped without it. Then the pixels of an image never
        depend on its neighbours. If not the image but its file is damaged, reading it raises.

        Raises:
          tf.errors.OpError: TensorFlow fails at all images although they are readable.
        """
        tf, _ = tensorflow()
        num_read = num_failed = 0
        while num_read < _CHUNK:
            try:
                for record, views in itertools.islice(self._run(position, 1), _CHUNK - num_read):
                    yield (position.offset, [record]), [views]
                    position, num_read = self._after(position), num_read + 1
            except tf.errors.OpError as error:
                record, views = self._crop_one(position)
                num_read, num_failed = num_read + 1, num_failed + isinstance(views, list)
                if num_failed == _CHUNK:
                    raise
                reason = error.message.partition("\n")[0].rpartition("}} ")[2]
                _LOG.warning("TensorFlow cannot decode record %d: %s", record.row, reason)
                yield (position.offset, [record]), [views]
                position = self._after(position)
        return position

    def _after(self, position: Position) -> Position:
        epoch, offset = position.epoch, position.offset + 1
        return Position(epoch, offset) if offset < self._share else Position(epoch + 1, 0)

    def _run(self, start: Position, chunk: int) -> Iterator[tuple[Record, decode.Crops]]:
        """Runs the pipeline, which returns `chunk` images at a time."""
        tf, _ = tensorflow()
        options = tf.data.Options()
        options.deterministic = True
        options.threading.private_threadpool_size = THREADS
        options.threading.max_intra_op_parallelism = 1
        cropped = self._images(start).map(self._traced_crop, THREADS, deterministic=True)
        ready = cropped.batch(chunk).prefetch(self._ahead).with_options(options)
        for rows, labels, errors, views in ready.as_numpy_iterator():
            for index, (row, label, error) in enumerate(zip(rows, labels, errors, strict=True)):
                record = Record(int(row), b"", int(label))
                if error:
                    yield record, decode.Unreadable(error.decode())
                else:
                    yield record, [pixels[index] for pixels in views]

    def _crop(self, image: Images) -> tuple[Any, ...]:
        """Returns row, label, error and the crops of all views of one image, as tensors."""
        tf, _ = tensorflow()
        encoded = image.image
        types = (tf.int64, tf.int64, tf.uint8, tf.string)
        height, width, pixels, error = tf.numpy_function(self._inspect, [encoded], types)
        for scalar in (height, width, error):
            scalar.set_shape([])
        count = len(self._views)
        boxes = tf.stack([box(image.numbers[view], height, width) for view in range(count)])

        def views():
            corner = tf.reduce_min(boxes[:, :2], axis=0)
            end = tf.reduce_max(boxes[:, :2] + boxes[:, 2:], axis=0)
            window = tf.concat([corner, end - corner], axis=0)  # covers all views
            part = tf.cond(
                tf.size(pixels) > 0,
                lambda: pixels[corner[0] : end[0], corner[1] : end[1]],
                lambda: _jpeg(encoded, window),
            )
            part.set_shape([None, None, 3])
            places = boxes - tf.concat([corner, [0, 0]], axis=0)
            return tuple(_resized(part, places[n], crop) for n, crop in enumerate(self._views))

        def blank():
            return tuple(tf.zeros([c.size, c.size, 3], tf.uint8) for c in self._views)

        return image.row, image.label, error, tf.cond(tf.equal(error, ""), views, blank)

    def _inspect(self, encoded: bytes) -> tuple[np.int64, np.int64, np.ndarray, bytes]:
        """Returns height, width, pixels and error of an image.

        The pixels are u8[0, 0, 3] if TensorFlow decodes the image like `decode.decode`, else
        u8[H, W, 3]. The error is empty if the image is readable.
        """
        pixels, error = np.zeros((0, 0, 3), np.uint8), ""
        height = width = 1
        try:
            file = decode.ruled(encoded, self._rules)
            height, width, plain, upright = decode.header(file)
            if not (plain and upright):
                pixels = decode.decode(file)
        except decode.Unreadable as failure:
            error = str(failure) or type(failure).__name__
        return np.int64(height), np.int64(width), pixels, error.encode()


def _jpeg(encoded: Any, window: Any) -> Any:
    """Decodes a box (top, left, height, width) of a JPEG to u8[H, W, 3], in TensorFlow."""
    tf, _ = tensorflow()
    # OpenCV and Pillow use the accurate inverse transform too.
    accurate = "INTEGER_ACCURATE"
    return tf.io.decode_and_crop_jpeg(encoded, window, channels=3, dct_method=accurate)


def _resized(image: Any, place: Any, crop: Any) -> Any:
    """Returns u8[S, S, 3], a box (top, left, height, width) of u8[H, W, 3], in TensorFlow.

    The counterpart of `decode.resize`: `antialias="exact"` widens the filter of a crop that
    shrinks; "area" averages the covered pixels if both sides shrink, and equals "none" otherwise;
    "none" interpolates between the neighbours.
    """
    tf, _ = tensorflow()
    top, left_edge, height, width = tf.unstack(place)
    cut, sides = image[top : top + height, left_edge : left_edge + width], (crop.size, crop.size)

    def interpolated():
        return tf.image.resize(cut, sides, crop.interpolation, antialias=crop.antialias == "exact")

    def averaged():
        return tf.image.resize(cut, sides, "area")

    shrinks = (crop.size < height) & (crop.size < width) & (crop.antialias == "area")
    resized = tf.cond(shrinks, averaged, interpolated)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)
