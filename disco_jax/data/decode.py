"""TensorFlow functions of one image on the host: decode, draw a crop, resize.

TensorFlow is imported when the first of them runs, so that this module costs nothing.
"""

import functools
import os
from typing import NamedTuple

import numpy as np

from disco_jax.data import crops

# Pillow's decoder, bit for bit. TensorFlow's default is off by a grey level on average, and no
# faster.
_DCT = "INTEGER_ACCURATE"


@functools.cache
def tensorflow():
    """(tensorflow, tensorflow_datasets), kept off the accelerators."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Its float kernels differ in the last bit by thread count; a replay must not.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.get_logger().setLevel("ERROR")
    tf.config.set_visible_devices([], "GPU")
    return tf, tfds


def crop_function(views):
    """(key, position, encoded, label) -> one u8[S, S, 3] a crop."""
    tf, _ = tensorflow()
    scale = np.array([crop.scale for crop in views], np.float32)
    ratio = np.log([crop.ratio for crop in views]).astype(np.float32)

    def decode(key, position, encoded, label):
        del label
        is_jpeg = tf.io.is_jpeg(encoded)

        def jpeg():
            boxes = boxes_of(key, position, tf.io.extract_jpeg_shape(encoded)[:2], scale, ratio)
            cuts = [
                tf.image.decode_and_crop_jpeg(encoded, b, channels=3, dct_method=_DCT)
                for b in boxes
            ]
            return [resized(cut, (c.size,) * 2, c) for cut, c in zip(cuts, views, strict=True)]

        def other():
            image = whole(encoded)
            boxes = boxes_of(key, position, tf.shape(image)[:2], scale, ratio)
            cuts = [tf.image.crop_to_bounding_box(image, *tf.unstack(box)) for box in boxes]
            return [resized(cut, (c.size,) * 2, c) for cut, c in zip(cuts, views, strict=True)]

        made = tf.cond(is_jpeg, jpeg, other)
        return [tf.ensure_shape(v, (c.size, c.size, 3)) for v, c in zip(made, views, strict=True)]

    return decode


def boxes_of(key, position, shape, scale, ratio):
    """[i32[4]] top, left, height, width a view; `crops.boxes` as TensorFlow operations."""
    tf, _ = tensorflow()
    draws = tf.random.stateless_uniform(
        (len(scale), crops.TRIES + 1, 2), [key, tf.cast(position, tf.int64)]
    )
    tries, place = draws[:, :-1], draws[:, -1]
    size = tf.cast(shape, tf.float32)
    area = size[0] * size[1] * (scale[:, :1] + (scale[:, 1:] - scale[:, :1]) * tries[..., 0])
    aspect = tf.exp(ratio[:, :1] + (ratio[:, 1:] - ratio[:, :1]) * tries[..., 1])
    sides = tf.round(tf.sqrt(tf.stack([area / aspect, area * aspect], -1)))  # [V, tries, (h, w)]
    fits = tf.reduce_all((sides > 0) & (sides <= size), -1)
    first = tf.argmax(tf.cast(fits, tf.int32), axis=1)  # the first of the largest
    found = tf.reduce_any(fits, axis=1)[:, None]
    limits = tf.exp(ratio)
    central = tf.stack(
        [
            tf.where(size[1] < limits[:, 0] * size[0], tf.round(size[1] / limits[:, 0]), size[0]),
            tf.where(size[1] > limits[:, 1] * size[0], tf.round(size[0] * limits[:, 1]), size[1]),
        ],
        -1,
    )
    chosen = tf.where(found, tf.gather(sides, first, batch_dims=1), central)
    free = size - chosen
    corner = tf.where(found, tf.floor(place * (free + 1)), tf.floor(free / 2))
    # A draw of almost 1 may round up to the edge.
    corner = tf.minimum(corner, free)
    return tf.unstack(tf.cast(tf.concat([corner, chosen], -1), tf.int32))


def evaluated(size, resize, interpolation, position, encoded, label):
    """The middle of an image, u8[size, size, 3], and its label; see `base.Source.evaluate`."""
    tf, _ = tensorflow()
    image = whole(encoded)
    shape = tf.shape(image)
    crop = Antialiased(interpolation)
    if not resize:
        image = resized(image, (size, size), crop)
    else:
        short = tf.minimum(shape[0], shape[1])
        high, wide = resize * shape[0] // short, resize * shape[1] // short
        image = resized(image, (high, wide), crop)
        # Halves round to even, as torchvision's do.
        top = tf.cast(tf.round((high - size) / 2), tf.int32)
        left = tf.cast(tf.round((wide - size) / 2), tf.int32)
        image = image[top : top + size, left : left + size]
    return tf.ensure_shape(image, (size, size, 3)), tf.cast(label, tf.int32)


class Antialiased(NamedTuple):
    """How evaluation resizes."""

    interpolation: str
    antialias: bool = True


def whole(encoded):
    """u8[H, W, 3] of a JPEG, PNG, GIF or BMP."""
    tf, _ = tensorflow()
    image = tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method=_DCT),
        lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    )
    return tf.ensure_shape(image, (None, None, 3))


def resized(image, shape, crop):
    """u8 of `shape`, by the crop's filter, rounded."""
    tf, _ = tensorflow()
    image = tf.image.resize(image, shape, crop.interpolation, antialias=crop.antialias)
    return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
