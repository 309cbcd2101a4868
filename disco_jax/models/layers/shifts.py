"""Convolutions and max-pools made of shifted maps, at which CPUs are quick.

XLA's own convolutions for CPUs take many times as long where every channel has a filter of its
own, and longer than a matrix product for 1x1 kernels and for maps with fewer places than
channels, whose kernels are larger than they are; so does the gradient of its max-pool. The same
sums in another order, and of a max-pool the same numbers.
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

Pads = Sequence[tuple[int, int]]


def by_shifts(
    images: Array,
    kernel: Array,
    strides: tuple[int, ...],
    padding: str | Pads,
    *,
    feature_group_count: int = 1,
    **rest,
) -> Array:
    """A convolution as a sum of shifted maps, or as one matrix product, where that is quicker.

    One filter a channel: every shifted map times its row of the kernel, summed. A 1x1 kernel: a
    product. At most as many places in all images as channels: shifted maps side by side, and a
    product. Others go through the plain convolution. To be given to `nn.Conv` as its
    `conv_general_dilated`, so that its parameters stay as they are. Sums are float32.

    Args:
      images: float[B, H, W, C].
      kernel: float[h, w, C / groups, F].
      strides: down and across.
      padding: of `jax.lax.conv_general_dilated`, as `rest`, without dilation.
      feature_group_count: groups of channels; all but 1 and C go through the plain convolution.

    Returns:
      float[B, H', W', F] of the images' dtype.
    """
    channels, sides = images.shape[-1], kernel.shape[:2]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(images.shape[1:3], sides, strides, padding)
    down, across = strides
    where = (down, across), tuple((low, high) for low, high in padding)
    if feature_group_count == channels == kernel.shape[-1]:
        return _depthwise(images, kernel, *where)
    places = images.shape[0] * math.prod(_sizes(images, sides, *where))
    if feature_group_count == 1 and (sides == (1, 1) or places <= channels):
        return _product(images, kernel, *where)
    return jax.lax.conv_general_dilated(
        images, kernel, *where, feature_group_count=feature_group_count, **rest
    )


def _product(images: Array, kernel: Array, strides: tuple[int, int], padding: Pads) -> Array:
    """A convolution as one matrix product of shifted maps side by side."""
    *sides, _, features = kernel.shape
    # The gradient is a sum over shifted maps: of more than one, float32.
    wide = images if sides == [1, 1] else images.astype(jnp.float32)
    wide = jnp.concatenate(_shifted(wide, sides, strides, padding), axis=-1)
    rows = kernel.astype(wide.dtype).reshape(-1, features)
    made = jnp.matmul(wide.reshape(-1, len(rows)), rows, preferred_element_type=jnp.float32)
    return made.reshape(*wide.shape[:-1], features).astype(images.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(images: Array, kernel: Array, strides: tuple[int, int], padding: Pads) -> Array:
    """float[B, H, W, C] by float[h, w, 1, C] -> float[B, H', W', C]; pads are below the sides."""
    return _summed(images, kernel, strides, padding)


def _kept(images: Array, kernel: Array, strides: tuple[int, int], padding: Pads):
    return _summed(images, kernel, strides, padding), (images, kernel)


def _gradients(
    strides: tuple[int, int], padding: Pads, given: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    images, kernel = given
    if strides == (1, 1):
        around = tuple(
            (side - 1 - low, side - 1 - high)
            for side, (low, high) in zip(kernel.shape, padding, strict=False)
        )
        of_images = _summed(gradient, kernel[::-1, ::-1], strides, around)
    else:
        spread = jax.vjp(lambda images: _summed(images, kernel, strides, padding), images)[1]
        (of_images,) = spread(gradient)
    return of_images, _of_kernel(images, kernel, strides, padding, gradient)


_depthwise.defvjp(_kept, _gradients)


def _summed(images: Array, kernel: Array, strides: tuple[int, int], padding: Pads) -> Array:
    """See `_depthwise`."""
    maps = _shifted(images, kernel.shape[:2], strides, padding)
    taps = kernel.astype(jnp.float32).reshape(-1, 1, 1, 1, images.shape[-1])
    return sum(x * tap for x, tap in zip(maps, taps, strict=True)).astype(images.dtype)


def _of_kernel(
    images: Array, kernel: Array, strides: tuple[int, int], padding: Pads, gradient: Array
) -> Array:
    """The gradient of `_depthwise`'s kernel.

    Tap by tap in a loop: a tenth quicker than all taps written out, to run and to compile.
    """
    (down, across), (batch, rows, columns, channels) = strides, gradient.shape
    span = batch, down * (rows - 1) + 1, across * (columns - 1) + 1, channels
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    gradient = gradient.astype(jnp.float32)

    def of_tap(place: Array) -> Array:
        read = jax.lax.dynamic_slice(images, (0, place[0], place[1], 0), span)
        return jnp.sum(read[:, ::down, ::across] * gradient, axis=(0, 1, 2))

    places = jnp.indices(kernel.shape[:2]).reshape(2, -1).T
    return jax.lax.map(of_tap, places).reshape(kernel.shape).astype(kernel.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(images: Array, padding: Pads) -> Array:
    """A 3x3 max-pool of stride 2; of equal values the first one gets the gradient, as XLA's does.

    Args:
      images: float[B, H, W, C].
      padding: ((top, bottom), (left, right)), filled with what no value is below.

    Returns:
      float[B, H', W', C].
    """
    # Not the largest of shifted maps: XLA would find those again wherever the result is read.
    return nn.max_pool(images, (3, 3), (2, 2), padding)


def _max_pool(images: Array, padding: Pads) -> tuple[Array, tuple[Array, Array]]:
    most = max_pool(images, padding)
    return most, (images, most)


def _max_pool_gradient(padding: Pads, given: tuple[Array, Array], gradient: Array):
    images, most = given
    maps, spread = jax.vjp(lambda x: _pooled(x.astype(jnp.float32), padding), images)
    taken, shares = jnp.zeros(most.shape, bool), []
    for x in maps:
        here = (x == most) & ~taken
        taken = taken | here
        shares.append(jnp.where(here, gradient.astype(jnp.float32), 0))
    return spread(shares)


max_pool.defvjp(_max_pool, _max_pool_gradient)


def _pooled(images: Array, padding: Pads) -> list[Array]:
    return _shifted(images, (3, 3), (2, 2), padding, fill=-jnp.inf)


def _shifted(
    images: Array, sides: Sequence[int], strides: Sequence[int], padding: Pads, fill: float = 0.0
) -> list[Array]:
    """What each tap of a kernel reads, row by row of the kernel: float[B, H', W', C] each."""
    rows, columns = _sizes(images, sides, strides, padding)
    (down, across), around = strides, [(0, 0), *padding, (0, 0)]
    images = jnp.pad(images, around, constant_values=fill)
    return [
        images[:, i : i + down * (rows - 1) + 1 : down, j : j + across * (columns - 1) + 1 : across]
        for i in range(sides[0])
        for j in range(sides[1])
    ]


def _sizes(
    images: Array, sides: Sequence[int], strides: Sequence[int], padding: Pads
) -> tuple[int, int]:
    """H' and W' of a convolution's result."""
    rows, columns = (
        (size + sum(pads) - side) // stride + 1
        for size, side, stride, pads in zip(images.shape[1:3], sides, strides, padding, strict=True)
    )
    return rows, columns
