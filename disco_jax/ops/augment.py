"""Photometric image operations for a batch on the accelerator, one factor an image.

Each computes on floats in [0, 1] what torchvision computes on the bytes of a PIL image, so results
differ by the rounding of those bytes: about a grey level of 255 an operation, more for hue, which
PIL turns in steps of 1/256.

Operations that mix channels work on the three planes apart and stack them at the end. Between two
of them the compiler drops the stack and the slices, so that one pass over the image does for both.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array

JITTER = ("brightness", "contrast", "saturation", "hue")  # what the columns of `jitter` scale

# PIL's weights of red, green and blue in the grey image; torchvision on floats has 0.2989 for red.
_LUMA = (0.299, 0.587, 0.114)

Planes = tuple[Array, ...]  # red, green and blue, each f32[B, H, W]


def brightness(images: Array, factors: Array) -> Array:
    """Blend of each image with black: factor * image, clipped to [0, 1].

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      factors: f32[B], at least 0; 1 keeps the image, 0 makes it black.

    Returns:
      f32[B, H, W, 3] in [0, 1].

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    return _on_planes(_brightness, images, factors)


def contrast(images: Array, factors: Array) -> Array:
    """Blend of each image with the mean of its grey version, clipped to [0, 1].

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      factors: f32[B], at least 0; 1 keeps the image, 0 leaves a uniform grey.

    Returns:
      f32[B, H, W, 3] in [0, 1].

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    return _on_planes(_contrast, images, factors)


def saturation(images: Array, factors: Array) -> Array:
    """Blend of each image with its grey version, clipped to [0, 1].

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      factors: f32[B], at least 0; 1 keeps the image, 0 makes it grey.

    Returns:
      f32[B, H, W, 3] in [0, 1].

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    return _on_planes(_saturation, images, factors)


def hue(images: Array, shifts: Array) -> Array:
    """Images whose hue, the H of HSV, is turned; value and chroma stay.

    With turn t (hue plus shift, in sixths), value V and chroma C = max - min, a channel is
    V - C clip(min(k, 4 - k), 0, 1) for k = (n + t) mod 6 and n = 5, 3, 1 for red, green, blue: the
    way to HSV and back without a division by V.

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      shifts: f32[B] in [-0.5, 0.5] turns; 1/3 makes red green, 0 keeps the image (to 1e-6).

    Returns:
      f32[B, H, W, 3] in [0, 1]; grey pixels stay as they are.

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    return _on_planes(_hue, images, shifts)


def grayscale(images: Array, mask: Array) -> Array:
    """The masked images in grey: (299 R + 587 G + 114 B) / 1000 in all three channels.

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      mask: bool[B], the images to change.

    Returns:
      f32[B, H, W, 3] in [0, 1].

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    _check(images, mask, bool)
    planes = _planes(images)
    grey, mask = _grey(planes), _column(mask)
    return _stack(tuple(jnp.where(mask, grey, plane) for plane in planes))


def solarize(images: Array, mask: Array) -> Array:
    """The masked images with every value of at least 0.5 replaced by one minus it.

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      mask: bool[B], the images to change.

    Returns:
      f32[B, H, W, 3] in [0, 1].

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    _check(images, mask, bool)
    return jnp.where(mask[:, None, None, None] & (images >= 0.5), 1.0 - images, images)


def flip(images: Array, mask: Array) -> Array:
    """The masked images mirrored left to right.

    Args:
      images: f32[B, H, W, 3].
      mask: bool[B], the images to change.

    Returns:
      f32[B, H, W, 3].

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    _check(images, mask, bool)
    return jnp.where(mask[:, None, None, None], images[:, :, ::-1], images)


def gaussian_blur(images: Array, sigma: Array, mirrored: Array | None = None) -> Array:
    """Pillow's Gaussian blur, which the published recipes use: three extended box filters an axis.

    Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box
    filtering", with edge pixels repeated before each of the three; Pillow also rounds to bytes
    six times on the way. An axis is one batched product with a matrix an image, which mirrors the
    image at no cost.

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      sigma: f32[B], at least 0, in pixels; 0 keeps the image.
      mirrored: bool[B], the images to mirror left to right as well; None: none of them.

    Returns:
      f32[B, H, W, 3] in [0, 1].

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    _check(images, sigma)
    mirrored = jnp.zeros(sigma.shape, bool) if mirrored is None else mirrored
    chex.assert_type(mirrored, bool)
    chex.assert_equal_shape([sigma, mirrored])
    _, height, width, _ = images.shape
    across = _thrice(sigma, width, mirrored)
    down = _thrice(sigma, height, jnp.zeros_like(mirrored))
    # One bfloat16 product, the default of TPUs, would round images to half a grey level; "high"
    # is off by an eighth (TF32) or less, and twice as fast as "highest".
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGH)
    planes = (product("bij,bjw->biw", down, plane) for plane in _planes(images))
    return _clip(_stack(tuple(product("bkw,bhw->bhk", across, plane) for plane in planes)))


def jitter(images: Array, factors: Array, order: Array) -> Array:
    """Brightness, contrast, saturation and hue, in an order that the whole batch shares.

    torchvision's ColorJitter with its draws given. One order a batch means that each of the four
    positions executes one operation and not a choice among the results of all four.

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      factors: f32[B, 4], columns as in `JITTER`; (1, 1, 1, 0) keeps an image (to 1e-6).
      order: i32[4], a permutation of 0..3: the operation that acts first, second, ...

    Returns:
      f32[B, H, W, 3] in [0, 1].

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    chex.assert_type([images, factors, order], [jnp.float32, jnp.float32, jnp.int32])
    chex.assert_shape([factors, order], [(images.shape[0], 4), (4,)])
    operations = (_brightness, _contrast, _saturation, _hue)
    branches = [_bind(operation, factors[:, i]) for i, operation in enumerate(operations)]
    planes = _planes(images)
    for position in range(4):
        planes = jax.lax.switch(order[position], branches, planes)
    return _stack(planes)


def normalize(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """(images - mean) / std, a channel at a time.

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      mean: three floats, in the units of the images.
      std: three positive floats, likewise.

    Returns:
      f32[B, H, W, 3].

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    chex.assert_type(images, jnp.float32)
    chex.assert_shape(images, (None, None, None, 3))
    mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 3) for x in (mean, std))
    return (images - mean) / std


def _check(images: Array, factors: Array, dtype: type = jnp.float32) -> None:
    """Holds `images` to f32[B, H, W, 3] and `factors` to dtype[B]."""
    chex.assert_type([images, factors], [jnp.float32, dtype])
    chex.assert_shape(images, (None, None, None, 3))
    chex.assert_shape(factors, images.shape[:1])


def _on_planes(operation: Callable[[Planes, Array], Planes], images: Array, values: Array) -> Array:
    """f32[B, H, W, 3] through an operation on planes."""
    _check(images, values)
    return _stack(operation(_planes(images), values))


def _planes(images: Array) -> Planes:
    """[B, H, W, 3] -> three of [B, H, W]."""
    return tuple(images[..., i] for i in range(3))


def _stack(planes: Planes) -> Array:
    """Three of [B, H, W] -> [B, H, W, 3]."""
    return jnp.stack(planes, axis=-1)


def _column(factors: Array) -> Array:
    """[B] -> [B, 1, 1], to meet a plane."""
    return factors[:, None, None]


def _clip(images: Array) -> Array:
    return jnp.clip(images, 0.0, 1.0)


def _brightness(planes: Planes, factors: Array) -> Planes:
    factors = _column(factors)
    return tuple(jnp.minimum(factors * plane, 1.0) for plane in planes)  # none is below 0


def _contrast(planes: Planes, factors: Array) -> Planes:
    mean = jnp.mean(_grey(planes), axis=(1, 2), keepdims=True)  # PIL rounds it to a byte
    return _blend(planes, mean, factors)


def _saturation(planes: Planes, factors: Array) -> Planes:
    return _blend(planes, _grey(planes), factors)


def _hue(planes: Planes, shifts: Array) -> Planes:
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    turn = _sixths(planes, chroma) + 6.0 * _column(shifts)
    channels = (_hue_channel(value, chroma, n + turn) for n in (5, 3, 1))
    return tuple(jnp.maximum(channel, 0.0) for channel in channels)  # none is above 1


def _grey(planes: Planes) -> Array:
    """f32[B, H, W]: PIL's grey version of the images."""
    red, green, blue = (weight * plane for weight, plane in zip(_LUMA, planes, strict=True))
    return red + green + blue


def _blend(planes: Planes, other: Array, factors: Array) -> Planes:
    """factor * plane + (1 - factor) * other, clipped to [0, 1]; exact at a factor of 1."""
    factors = _column(factors)
    other = (1.0 - factors) * other
    return tuple(_clip(factors * plane + other) for plane in planes)


def _sixths(planes: Planes, chroma: Array) -> Array:
    """f32[B, H, W] in [-1, 5]: hue in sixths of a turn, 0 for grey pixels."""
    red, green, blue = planes
    scale = 1.0 / jnp.where(chroma > 0, chroma, 1.0)
    # Not `value == red`: a compiler that computes a channel twice may round it in two ways.
    most_red = (red >= green) & (red >= blue)
    most_green = green >= blue  # if it is not red
    # The difference of the two channels that are not the largest, and where its sixth begins.
    others = jnp.where(most_green, blue - red, red - green)
    difference = jnp.where(most_red, green - blue, others)
    begin = jnp.where(most_red, 0.0, jnp.where(most_green, 2.0, 4.0))
    return begin + difference * scale


def _hue_channel(value: Array, chroma: Array, turn: Array) -> Array:
    """V - C clip(min(k, 4 - k), 0, 1) for k = turn mod 6."""
    k = turn - 6.0 * jnp.floor(turn * (1 / 6))  # several times faster than `mod` on a CPU
    return value - chroma * _clip(jnp.minimum(k, 4.0 - k))


def _thrice(sigma: Array, size: int, mirrored: Array) -> Array:
    """f32[B, size, size], rows of sum 1: three box filters after one another along one axis."""
    box = _box_matrix(sigma, size, jnp.zeros_like(mirrored))
    last = _box_matrix(sigma, size, mirrored)
    product = functools.partial(jnp.einsum, "bij,bjk->bik", precision=jax.lax.Precision.HIGH)
    return product(last, product(box, box))


def _box_matrix(sigma: Array, size: int, mirrored: Array) -> Array:
    """f32[B, size, size], rows of sum 1: an extended box filter along one axis.

    The box has weight w at offsets up to l and a w, 0 <= a < 1, at l + 1, such that three of them
    have the variance sigma^2. What falls outside the image goes to the edge pixel on that side.
    """
    variance = jnp.square(sigma) / 3
    whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part = part / (6 * (variance - jnp.square(whole + 1)))
    weight = (1 / (2 * (whole + part) + 1))[:, None, None]
    whole, part = whole[:, None, None], part[:, None, None]
    column = jnp.arange(size, dtype=jnp.float32)[None, None, :]
    row = column.reshape(1, size, 1)
    row = jnp.where(mirrored[:, None, None], size - 1 - row, row)

    def at(offset):
        return jnp.where(offset <= whole, 1.0, jnp.where(offset <= whole + 1, part, 0.0))

    def beyond(offset):  # the sum of `at` over this offset and all further ones
        return jnp.maximum(jnp.where(offset <= whole + 1, whole + 1 - offset + part, 0.0), 0.0)

    if size == 1:
        return jnp.ones((sigma.shape[0], 1, 1), jnp.float32)
    inside = at(jnp.abs(row - column))
    left, right = beyond(row), beyond(size - 1 - row)
    inside = jnp.where(column == 0, left, jnp.where(column == size - 1, right, inside))
    return weight * inside


def _bind(operation: Callable[[Planes, Array], Planes], factors: Array) -> Callable:
    """The branch of a switch: planes -> planes."""
    return lambda planes: operation(planes, factors)
