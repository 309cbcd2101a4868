"""Photometric image operations for a batch on the accelerator, one factor an image.

Each computes on floats in [0, 1] what torchvision computes on the bytes of a PIL image, so results
differ by the rounding of those bytes: about a grey level of 255 an operation, more for hue, which
PIL turns in steps of 1/256.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

JITTER = ("brightness", "contrast", "saturation", "hue")  # what the columns of `jitter` scale

# PIL's weights of red, green and blue in the grey image; torchvision on floats has 0.2989 for red.
_LUMA = (0.299, 0.587, 0.114)

# At this width, in pixels, the weight of a neighbour underflows to zero in float32.
_SMALLEST_SIGMA = 0.05

# Offsets beyond the image that a blur sums one by one; it integrates the rest.
_TAIL = 32


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
    _check(images, factors)
    return _clip(_column(factors) * images)


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
    _check(images, factors)
    mean = jnp.mean(_grey(images), axis=(1, 2, 3), keepdims=True)  # PIL rounds it to a byte
    return _blend(images, mean, factors)


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
    _check(images, factors)
    return _blend(images, _grey(images), factors)


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
    _check(images, shifts)
    value = jnp.max(images, axis=-1)
    chroma = value - jnp.min(images, axis=-1)
    turn = _sixths(images, value, chroma) + 6.0 * shifts[:, None, None]
    return _clip(jnp.stack([_hue_channel(value, chroma, n + turn) for n in (5, 3, 1)], axis=-1))


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
    return jnp.where(_column(mask), _grey(images), images)


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
    return jnp.where(_column(mask) & (images >= 0.5), 1.0 - images, images)


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
    return jnp.where(_column(mask), images[:, :, ::-1], images)


def gaussian_blur(images: Array, sigma: Array) -> Array:
    """Convolution of each image with a Gaussian of its own width; edge pixels are repeated.

    The kernel is not cut off: each axis is one batched product with a matrix whose rows hold the
    whole Gaussian. Pillow, behind the published recipes, has three box filters of the same
    variance, a few grey levels away.

    Args:
      images: f32[B, H, W, 3] in [0, 1].
      sigma: f32[B], at least 0, in pixels; up to 0.05 the image stays as it is.

    Returns:
      f32[B, H, W, 3] in [0, 1].

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    _check(images, sigma)
    _, height, width, _ = images.shape
    # One bfloat16 product, the default of TPUs, would round images to half a grey level; "high"
    # is off by an eighth (TF32) or less, and twice as fast as "highest".
    precision = jax.lax.Precision.HIGH
    down, across = _blur_matrix(sigma, height), _blur_matrix(sigma, width)
    images = jnp.einsum("bij,bjwc->biwc", down, images, precision=precision)
    return _clip(jnp.einsum("bkw,bhwc->bhkc", across, images, precision=precision))


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
    operations = (brightness, contrast, saturation, hue)
    branches = [_bind(operation, factors[:, i]) for i, operation in enumerate(operations)]
    for position in range(4):
        images = jax.lax.switch(order[position], branches, images)
    return images


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


def _column(factors: Array) -> Array:
    """[B] -> [B, 1, 1, 1], to meet the images."""
    return factors[:, None, None, None]


def _clip(images: Array) -> Array:
    return jnp.clip(images, 0.0, 1.0)


def _grey(images: Array) -> Array:
    """f32[B, H, W, 1]: PIL's grey version of the images."""
    red, green, blue = (weight * images[..., i] for i, weight in enumerate(_LUMA))
    return (red + green + blue)[..., None]


def _blend(images: Array, others: Array, factors: Array) -> Array:
    """factor * images + (1 - factor) * others, clipped to [0, 1]; exact at a factor of 1."""
    factors = _column(factors)
    return _clip(factors * images + (1.0 - factors) * others)


def _sixths(images: Array, value: Array, chroma: Array) -> Array:
    """f32[B, H, W] in [-1, 5]: hue in sixths of a turn, 0 for grey pixels."""
    red, green, blue = (images[..., i] for i in range(3))
    chroma = jnp.where(chroma > 0, chroma, 1.0)
    near_green, near_blue = 2.0 + (blue - red) / chroma, 4.0 + (red - green) / chroma
    others = jnp.where(value == green, near_green, near_blue)
    return jnp.where(value == red, (green - blue) / chroma, others)


def _hue_channel(value: Array, chroma: Array, turn: Array) -> Array:
    """V - C clip(min(k, 4 - k), 0, 1) for k = turn mod 6."""
    k = turn - 6.0 * jnp.floor(turn / 6.0)  # several times faster than `mod` on a CPU
    return value - chroma * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)


def _blur_matrix(sigma: Array, size: int) -> Array:
    """f32[B, size, size], rows of sum 1: the blur of one axis, edge pixels repeated.

    What a row gives to pixels outside the image, it gives to the edge pixel on that side.
    """
    if size == 1:
        return jnp.ones((sigma.shape[0], 1, 1), jnp.float32)
    sigma = jnp.maximum(sigma, _SMALLEST_SIGMA)
    row, column = jnp.arange(size)[:, None], jnp.arange(size)[None, :]
    inside = _gaussian(jnp.abs(row - column)[None], sigma[:, None, None])
    outward = _tails(sigma, size)  # [B, size]: all the weight at an offset or beyond it
    left, right = outward[:, :, None], outward[:, ::-1, None]
    weights = jnp.where(column[None] == 0, left, jnp.where(column[None] == size - 1, right, inside))
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _tails(sigma: Array, size: int) -> Array:
    """f32[B, size]: sum of the Gaussian over all offsets d >= i, for i in 0..size-1."""
    offsets = jnp.arange(size + _TAIL)[None]
    terms = _gaussian(offsets, sigma[:, None])
    # Midpoint rule: a Gaussian that is wide enough to reach this far is smooth from pixel to pixel.
    end = (size + _TAIL - 0.5) / (jnp.sqrt(2.0) * sigma)
    rest = sigma * jnp.sqrt(jnp.pi / 2) * jax.lax.erfc(end)
    sums = jnp.cumsum(terms[:, ::-1], axis=1)[:, ::-1] + rest[:, None]
    return sums[:, :size]


def _gaussian(offsets: Array, sigma: Array) -> Array:
    """exp(-d^2 / 2 sigma^2), not normalised; ranks must agree."""
    return jnp.exp(-0.5 * jnp.square(offsets / sigma))


def _bind(operation, factors: Array):
    """The branch of a switch: images -> images."""
    return lambda images: operation(images, factors)
