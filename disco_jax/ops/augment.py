"""Photometric image operations on batches, run on the accelerator with one factor per image.

The functions apply torchvision's operations to floats in [0, 1] instead of the bytes of a PIL
image. Results differ from PIL's by its rounding: about one grey level of 255 per operation, and
more for hue, which PIL rotates in steps of 1/256.

Operations that mix channels work on three separate planes and stack them at the end. Between two
such operations the compiler removes the stack and the slices and fuses both into one pass.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array

JITTER = ("brightness", "contrast", "saturation", "hue")  # columns of `jitter`'s factors

# PIL's weights of red, green and blue in the grey image. torchvision's float version has 0.2989 for
# red.
_LUMA = (0.299, 0.587, 0.114)

Planes = tuple[Array, ...]  # red, green and blue, each f32[B, H, W]


def brightness(images: Array, factors: Array) -> Array:
    """Blends each image with black: min(factor * image, 1).

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      factors: f32[B], at least 0; 1 returns the image unchanged, 0 returns black.

    Returns:
      f32[B, H, W, 3] in [0, 1].

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    return _apply_to_planes(_brightness, images, factors)


def contrast(images: Array, factors: Array) -> Array:
    """Blends each image with the mean of its grey version and clips to [0, 1].

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      factors: f32[B], at least 0; 1 returns the image unchanged, 0 returns a uniform grey.

    Returns:
      f32[B, H, W, 3] in [0, 1].

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    return _apply_to_planes(_contrast, images, factors)


def saturation(images: Array, factors: Array) -> Array:
    """Blends each image with its grey version and clips to [0, 1].

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      factors: f32[B], at least 0; 1 returns the image unchanged, 0 returns its grey version.

    Returns:
      f32[B, H, W, 3] in [0, 1].

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    return _apply_to_planes(_saturation, images, factors)


def hue(images: Array, shifts: Array) -> Array:
    """Rotates the hue (H of HSV) of each image and preserves its value and chroma.

    With t the rotated hue in sixths of a turn, V the value and C = max - min the chroma, a channel
    is V - C clip(min(k, 4 - k), 0, 1) for k = (n + t) mod 6 and n = 5, 3, 1 for red, green, blue.
    This equals the conversion to HSV and back, without the division by V.

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      shifts: f32[B] in [-0.5, 0.5] turns; 1/3 turns red into green, 0 preserves the image to 1e-6.

    Returns:
      f32[B, H, W, 3] in [0, 1]; grey pixels are unchanged.

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    return _apply_to_planes(_hue, images, shifts)


def grayscale(images: Array, mask: Array) -> Array:
    """Converts the masked images to grey: (299 R + 587 G + 114 B) / 1000 in all three channels.

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      mask: bool[B], true for the images to change.

    Returns:
      f32[B, H, W, 3] in [0, 1].

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    _check(images, mask, bool)
    planes = _planes(images)
    grey, mask = _grey(planes), _per_image(mask)
    return _stack(tuple(jnp.where(mask, grey, plane) for plane in planes))


def solarize(images: Array, mask: Array) -> Array:
    """Inverts every value v >= 0.5 of the masked images to 1 - v.

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      mask: bool[B], true for the images to change.

    Returns:
      f32[B, H, W, 3] in [0, 1].

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    _check(images, mask, bool)
    return jnp.where(mask[:, None, None, None] & (images >= 0.5), 1.0 - images, images)


def flip(images: Array, mask: Array) -> Array:
    """Mirrors the masked images left to right.

    Args:
      images: f32[B, H, W, 3].
      mask: bool[B], true for the images to change.

    Returns:
      f32[B, H, W, 3].

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    _check(images, mask, bool)
    return jnp.where(mask[:, None, None, None], images[:, :, ::-1], images)


def gaussian_blur(images: Array, sigma: Array, mirrored: Array | None = None) -> Array:
    """Blurs each image as Pillow's GaussianBlur does: three extended box filters along each axis.

    The published recipes use Pillow's filter: Gwosdek et al. 2011, "Theoretical foundations of
    Gaussian convolution by extended box filtering", with edge pixels repeated before each of the
    three filters. Pillow also rounds to bytes six times on the way. Each axis is one batched matrix
    product with one matrix per image, which can mirror the image at no cost.

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      sigma: f32[B], at least 0, in pixels; 0 returns the image unchanged.
      mirrored: bool[B], true for images to mirror left to right as well; None mirrors no image.

    Returns:
      f32[B, H, W, 3] in [0, 1].

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    _check(images, sigma)
    mirrored = jnp.zeros(sigma.shape, bool) if mirrored is None else mirrored
    chex.assert_type(mirrored, bool)
    chex.assert_equal_shape([sigma, mirrored])
    _, height, width, _ = images.shape
    across = _three_boxes(sigma, width, mirrored)
    down = _three_boxes(sigma, height, jnp.zeros_like(mirrored))
    # TPUs default to one bfloat16 product, which rounds images to half a grey level. The error of
    # "high" is at most an eighth of a grey level (TF32), and it is twice as fast as "highest".
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGH)
    planes = (product("bij,bjw->biw", down, plane) for plane in _planes(images))
    return _clip(_stack(tuple(product("bkw,bhw->bhk", across, plane) for plane in planes)))


def jitter(images: Array, factors: Array, order: Array) -> Array:
    """Applies brightness, contrast, saturation and hue in one order for the whole batch.

    The equivalent of torchvision's ColorJitter with its random draws as arguments. Because the
    order is the same for all images, each of the four positions executes one operation instead of
    a selection among the results of all four.

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      factors: f32[B, 4], columns as in `JITTER`; (1, 1, 1, 0) preserves an image to 1e-6.
      order: i32[4], a permutation of 0..3: indices into `JITTER` in the order of application.

    Returns:
      f32[B, H, W, 3] in [0, 1].

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
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
    """Returns (images - mean) / std, computed per channel.

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      mean: three floats, one per channel, in the units of the images.
      std: three positive floats, in the same units.

    Returns:
      f32[B, H, W, 3].

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    chex.assert_type(images, jnp.float32)
    chex.assert_shape(images, (None, None, None, 3))
    means, deviations = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 3) for x in (mean, std))
    return (images - means) / deviations


def _check(images: Array, factors: Array, dtype: type = jnp.float32) -> None:
    """Raises AssertionError unless `images` are f32[B, H, W, 3] and `factors` dtype[B]."""
    chex.assert_type([images, factors], [jnp.float32, dtype])
    chex.assert_shape(images, (None, None, None, 3))
    chex.assert_shape(factors, images.shape[:1])


def _apply_to_planes(
    operation: Callable[[Planes, Array], Planes], images: Array, values: Array
) -> Array:
    """Applies an operation on planes to images f32[B, H, W, 3]."""
    _check(images, values)
    return _stack(operation(_planes(images), values))


def _planes(images: Array) -> Planes:
    """Splits [B, H, W, 3] into three planes [B, H, W]."""
    return tuple(images[..., i] for i in range(3))


def _stack(planes: Planes) -> Array:
    """Stacks three planes [B, H, W] into [B, H, W, 3]."""
    return jnp.stack(planes, axis=-1)


def _per_image(factors: Array) -> Array:
    """Reshapes [B] to [B, 1, 1], to broadcast against a plane."""
    return factors[:, None, None]


def _clip(images: Array) -> Array:
    return jnp.clip(images, 0.0, 1.0)


def _brightness(planes: Planes, factors: Array) -> Planes:
    factors = _per_image(factors)
    return tuple(jnp.minimum(factors * plane, 1.0) for plane in planes)  # inputs are nonnegative


def _contrast(planes: Planes, factors: Array) -> Planes:
    mean = jnp.mean(_grey(planes), axis=(1, 2), keepdims=True)  # PIL rounds it to a byte
    return _blend(planes, mean, factors)


def _saturation(planes: Planes, factors: Array) -> Planes:
    return _blend(planes, _grey(planes), factors)


def _hue(planes: Planes, shifts: Array) -> Planes:
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    turn = _hue_in_sixths(planes, chroma) + 6.0 * _per_image(shifts)
    channels = (_hue_channel(value, chroma, n + turn) for n in (5, 3, 1))
    return tuple(jnp.maximum(channel, 0.0) for channel in channels)  # at most 1 already


def _grey(planes: Planes) -> Array:
    """Returns PIL's grey version of the images, f32[B, H, W]."""
    red, green, blue = (weight * plane for weight, plane in zip(_LUMA, planes, strict=True))
    return red + green + blue


def _blend(planes: Planes, other: Array, factors: Array) -> Planes:
    """Returns factor * plane + (1 - factor) * other, clipped to [0, 1]; exact for factor 1."""
    factors = _per_image(factors)
    other = (1.0 - factors) * other
    return tuple(_clip(factors * plane + other) for plane in planes)


def _hue_in_sixths(planes: Planes, chroma: Array) -> Array:
    """Returns the hue in sixths of a turn, f32[B, H, W] in [-1, 5]; 0 for grey pixels."""
    red, green, blue = planes
    scale = 1.0 / jnp.where(chroma > 0, chroma, 1.0)
    # `value == red` would be unsafe: a compiler that computes a channel twice may round it
    # differently each time.
    most_red = (red >= green) & (red >= blue)
    most_green = green >= blue  # used only where `most_red` is false
    # The difference of the two smaller channels, and the hue at which that sector starts.
    others = jnp.where(most_green, blue - red, red - green)
    difference = jnp.where(most_red, green - blue, others)
    start = jnp.where(most_red, 0.0, jnp.where(most_green, 2.0, 4.0))
    return start + difference * scale


def _hue_channel(value: Array, chroma: Array, turn: Array) -> Array:
    """Returns V - C clip(min(k, 4 - k), 0, 1) for k = turn mod 6."""
    k = turn - 6.0 * jnp.floor(turn * (1 / 6))  # several times faster than `mod` on CPUs
    return value - chroma * _clip(jnp.minimum(k, 4.0 - k))


def _three_boxes(sigma: Array, size: int, mirrored: Array) -> Array:
    """Returns the matrices of three successive box filters along one axis.

    f32[B, size, size], each row sums to 1.
    """
    box = _box_matrix(sigma, size, jnp.zeros_like(mirrored))
    last = _box_matrix(sigma, size, mirrored)
    product = functools.partial(jnp.einsum, "bij,bjk->bik", precision=jax.lax.Precision.HIGH)
    return product(last, product(box, box))


def _box_matrix(sigma: Array, size: int, mirrored: Array) -> Array:
    """Returns the matrix of an extended box filter along one axis for each image.

    The box has weight w at offsets up to l and weight a w, 0 <= a < 1, at offset l + 1, chosen so
    that three boxes have variance sigma^2. Weight that falls outside the image is added to the edge
    pixel on that side.

    Returns:
      f32[B, size, size], each row sums to 1.
    """
    variance = jnp.square(sigma) / 3
    radius = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
    end = (2 * radius + 1) * (radius * (radius + 1) - 3 * variance)
    end = end / (6 * (variance - jnp.square(radius + 1)))
    weight = (1 / (2 * (radius + end) + 1))[:, None, None]
    radius, end = radius[:, None, None], end[:, None, None]
    column = jnp.arange(size, dtype=jnp.float32)[None, None, :]
    row = column.reshape(1, size, 1)
    row = jnp.where(mirrored[:, None, None], size - 1 - row, row)

    def at(offset):
        return jnp.where(offset <= radius, 1.0, jnp.where(offset <= radius + 1, end, 0.0))

    def from_offset(offset):  # the sum of `at` over this offset and all larger ones
        return jnp.maximum(jnp.where(offset <= radius + 1, radius + 1 - offset + end, 0.0), 0.0)

    if size == 1:
        return jnp.ones((sigma.shape[0], 1, 1), jnp.float32)
    inside = at(jnp.abs(row - column))
    first, last = from_offset(row), from_offset(size - 1 - row)
    inside = jnp.where(column == 0, first, jnp.where(column == size - 1, last, inside))
    return weight * inside


def _bind(operation: Callable[[Planes, Array], Planes], factors: Array) -> Callable:
    """Returns a branch for `jax.lax.switch`: planes -> planes."""
    return lambda planes: operation(planes, factors)
