"""Crop boxes with the sampling and rounding of torchvision, and batched crops of small images."""

import math

import numpy as np

from disco_jax.data.seeds import seed_words

TRIES = 10
# Uniform numbers consumed by a box, [TRIES + 2, 2]: (area, aspect) of each try, then (top, left).
# The last row is unused: it pads a box to whole blocks of the generator, see `uniforms`.
DRAWS = (TRIES + 2, 2)
_BLOCK = 4  # numbers that Philox generates per step of its counter


def uniforms(seed: int, epoch: int, host: int, view: int, first: int, count: int) -> np.ndarray:
    """Returns f64[count, *DRAWS] in [0, 1) for the records at positions first, first + 1, ...

    Row i depends only on (seed, epoch, host, view, first + i), not on the batch it belongs to.
    """
    generator = np.random.Philox(key=seed_words(seed, epoch, host, view))
    generator.advance(first * math.prod(DRAWS) // _BLOCK)
    return np.random.Generator(generator).random((count, *DRAWS))


def boxes(
    draws: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Computes the boxes of random resized crops, distributed as in torchvision.

    As in RandomResizedCrop, each of ten tries has an area uniform in `scale` and an aspect ratio
    log-uniform in `ratio`; the first one that fits is placed uniformly. If none fits, the box is
    the largest central one within `ratio`.

    Args:
      draws: f64[N, *DRAWS] in [0, 1).
      height: i64[N], heights of the images in pixels.
      width: i64[N], widths of the images in pixels.
      scale: smallest and largest fraction of the image area.
      ratio: smallest and largest width / height.

    Returns:
      i64[N, 4]: top, left, height, width, in pixels.
    """
    tries = draws[:, :TRIES]
    area = (height * width)[:, None] * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + (high - low) * tries[..., 1])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (h > 0) & (w <= width[:, None]) & (h <= height[:, None])
    first_fit = np.arange(len(draws)), np.argmax(fits, axis=1)
    fallback_h, fallback_w = central_box(height, width, ratio)
    any_fit = fits[first_fit]
    h, w = np.where(any_fit, h[first_fit], fallback_h), np.where(any_fit, w[first_fit], fallback_w)
    free_h, free_w = height - h, width - w
    top = np.where(any_fit, np.floor(draws[:, TRIES, 0] * (free_h + 1)), free_h // 2)
    left_edge = np.where(any_fit, np.floor(draws[:, TRIES, 1] * (free_w + 1)), free_w // 2)
    return np.stack([top, left_edge, h, w], axis=1).astype(np.int64)


def central_box(height, width, ratio):
    """Returns height and width of the largest box within `ratio`, f64[N] each."""
    h = np.where(width < ratio[0] * height, np.rint(width / ratio[0]), height)
    w = np.where(width > ratio[1] * height, np.rint(height * ratio[1]), width)
    return h, w


def resized(height: int, width: int, resize: int) -> tuple[int, int]:
    """Returns (height, width) scaled to a shorter side of `resize`; rounds the longer one down."""
    short = min(height, width)
    return resize * height // short, resize * width // short


def centre(height: int, width: int, size: int) -> tuple[int, int]:
    """Returns top and left of the central square; halves round to even, as in torchvision."""
    return round((height - size) / 2), round((width - size) / 2)


def cut(images: np.ndarray, places: np.ndarray, size: int, interpolation: str, antialias: bool):
    """Crops and resizes a whole batch of small images of one size.

    A resize is linear and separable, so each crop is two matrix products. The result equals
    Pillow's resize of the cropped box up to its rounding between the two passes.

    Args:
      images: u8[N, H, W, C].
      places: i64[N, 4], the boxes (top, left, height, width); see `boxes`.
      size: S, the side of the resized crops in pixels.
      interpolation: "bilinear" or "bicubic".
      antialias: whether to widen the filter if the box is larger than the crop.

    Returns:
      u8[N, S, S, C].
    """
    _, height, width, _ = images.shape
    top, left_edge, h, w = places.T
    rows = _weights(top, h, height, size, interpolation, antialias)
    columns = _weights(left_edge, w, width, size, interpolation, antialias)
    out = np.einsum("nsh,nhwc->nswc", rows, images.astype(np.float32), optimize=True)
    out = np.einsum("ntw,nswc->nstc", columns, out, optimize=True)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def _weights(start, length, side, size, interpolation, antialias):
    """Returns f32[N, size, side], the weight of each source pixel in each resized pixel."""
    step = length / size  # source pixels per resized pixel
    centre_ = start[:, None] + (np.arange(size) + 0.5) * step[:, None]
    pixel = np.arange(side) + 0.5
    reach = np.maximum(step, 1.0) if antialias else np.ones_like(step)
    x = np.abs(pixel - centre_[..., None]) / reach[:, None, None]
    if interpolation == "bilinear":
        weights = np.maximum(0.0, 1 - x)
    else:  # Keys' cubic with a = -0.5, as in Pillow
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    inside = (pixel > start[:, None]) & (pixel < (start + length)[:, None])
    weights = weights * inside[:, None, :]
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
