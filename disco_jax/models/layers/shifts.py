"""Convolutions and max-pools as sums and products of shifted maps, which are faster on CPUs.

XLA's convolutions for CPUs are many times slower for depthwise kernels. They are slower than a
matrix product for 1x1 kernels and for maps with fewer positions than channels, whose kernels are
larger than they are. So is the gradient of XLA's max-pool. Sums have the same terms in another
order; max-pools are equal to the bit.
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

Pads = Sequence[tuple[int, int]]


def shift_and_add(
    images: Array,
    kernel: Array,
    strides: tuple[int, ...],
    padding: str | Pads,
    *,
    feature_group_count: int = 1,
    **kwargs,
) -> Array:
    """Computes a convolution from shifted maps where that is faster on CPUs.

    Depthwise kernels: the sum of shifted maps, each times its tap of the kernel. 1x1 kernels: one
    matrix product. At most as many positions in the batch as input channels: shifted maps side by
    side, and one matrix product. All others take `jax.lax.conv_general_dilated`. Sums are float32.
    Pass it to `nn.Conv` as `conv_general_dilated`, so that parameters keep their shapes.

    Args:
      images: float[B, H, W, C].
      kernel: float[h, w, C / groups, F].
      strides: vertical and horizontal stride.
      padding: as `jax.lax.conv_general_dilated` takes it.
      feature_group_count: groups of channels; only 1 and C use shifted maps.
      **kwargs: further arguments of `jax.lax.conv_general_dilated`, without dilation.

    Returns:
      float[B, H', W', F] in the dtype of the images.
    """
    channels, sides = images.shape[-1], kernel.shape[:2]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(images.shape[1:3], sides, strides, padding)
    down, across = strides
    window = (down, across), tuple((low, high) for low, high in padding)
    if feature_group_count == channels == kernel.shape[-1]:
        return _depthwise(images, kernel, *window)
    positions = images.shape[0] * math.prod(_output_size(images, sides, *window))
    if feature_group_count == 1 and (sides == (1, 1) or positions <= channels):
        return _matrix_product(images, kernel, *window)
    return jax.lax.conv_general_dilated(
        images, kernel, *window, feature_group_count=feature_group_count, **kwargs
    )


def _matrix_product(images: Array, kernel: Array, strides: tuple[int, int], padding: Pads) -> Array:
    """Computes a convolution as one matrix product of shifted maps side by side."""
    *sides, _, features = kernel.shape
    # The gradient is a sum over shifted maps; if there are several, it needs float32.
    patches = images if sides == [1, 1] else images.astype(jnp.float32)
    patches = jnp.concatenate(_shifted(patches, sides, strides, padding), axis=-1)
    matrix = kernel.astype(patches.dtype).reshape(-1, features)
    out = jnp.matmul(patches.reshape(-1, len(matrix)), matrix, preferred_element_type=jnp.float32)
    return out.reshape(*patches.shape[:-1], features).astype(images.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(images: Array, kernel: Array, strides: tuple[int, int], padding: Pads) -> Array:
    """Convolves float[B, H, W, C] with float[h, w, 1, C]; padding is below the kernel's sides."""
    return _sum_of_shifts(images, kernel, strides, padding)


def _depthwise_forward(images: Array, kernel: Array, strides: tuple[int, int], padding: Pads):
    return _sum_of_shifts(images, kernel, strides, padding), (images, kernel)


def _depthwise_backward(
    strides: tuple[int, int], padding: Pads, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    images, kernel = residuals
    if strides == (1, 1):
        pads = tuple(
            (side - 1 - low, side - 1 - high)
            for side, (low, high) in zip(kernel.shape, padding, strict=False)
        )
        image_gradient = _sum_of_shifts(gradient, kernel[::-1, ::-1], strides, pads)
    else:
        transpose = jax.vjp(lambda images: _sum_of_shifts(images, kernel, strides, padding), images)
        (image_gradient,) = transpose[1](gradient)
    return image_gradient, _kernel_gradient(images, kernel, strides, padding, gradient)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _sum_of_shifts(images: Array, kernel: Array, strides: tuple[int, int], padding: Pads) -> Array:
    """Computes `_depthwise`."""
    maps = _shifted(images, kernel.shape[:2], strides, padding)
    taps = kernel.astype(jnp.float32).reshape(-1, 1, 1, 1, images.shape[-1])
    return sum(x * tap for x, tap in zip(maps, taps, strict=True)).astype(images.dtype)


def _kernel_gradient(
    images: Array, kernel: Array, strides: tuple[int, int], padding: Pads, gradient: Array
) -> Array:
    """Computes the gradient of `_depthwise` with respect to the kernel.

    Loops over the taps, which runs and compiles a tenth faster than unrolled code.
    """
    (down, across), (batch, rows, columns, channels) = strides, gradient.shape
    span = batch, down * (rows - 1) + 1, across * (columns - 1) + 1, channels
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    gradient = gradient.astype(jnp.float32)

    def tap_gradient(tap: Array) -> Array:
        read = jax.lax.dynamic_slice(images, (0, tap[0], tap[1], 0), span)
        return jnp.sum(read[:, ::down, ::across] * gradient, axis=(0, 1, 2))

    taps = jnp.indices(kernel.shape[:2]).reshape(2, -1).T
    return jax.lax.map(tap_gradient, taps).reshape(kernel.shape).astype(kernel.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(images: Array, padding: Pads) -> Array:
    """Computes a 3x3 max-pool of stride 2 whose gradient is fast on CPUs.

    Among equal values the first one gets the gradient, as in XLA.

    Args:
      images: float[B, H, W, C].
      padding: ((top, bottom), (left, right)), filled with -inf.

    Returns:
      float[B, H', W', C].
    """
    # A maximum of shifted maps would be recomputed by XLA for each of its readers.
    return nn.max_pool(images, (3, 3), (2, 2), padding)


def _max_pool_forward(images: Array, padding: Pads) -> tuple[Array, tuple[Array, Array]]:
    maxima = max_pool(images, padding)
    return maxima, (images, maxima)


def _max_pool_backward(padding: Pads, residuals: tuple[Array, Array], gradient: Array):
    images, maxima = residuals
    maps, transpose = jax.vjp(lambda x: _pool_windows(x.astype(jnp.float32), padding), images)
    assigned, cotangents = jnp.zeros(maxima.shape, bool), []
    for x in maps:
        first = (x == maxima) & ~assigned
        assigned = assigned | first
        cotangents.append(jnp.where(first, gradient.astype(jnp.float32), 0))
    return transpose(cotangents)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _pool_windows(images: Array, padding: Pads) -> list[Array]:
    return _shifted(images, (3, 3), (2, 2), padding, fill=-jnp.inf)


def _shifted(
    images: Array, sides: Sequence[int], strides: Sequence[int], padding: Pads, fill: float = 0.0
) -> list[Array]:
    """Returns the input of each tap of a kernel, row by row: float[B, H', W', C] each."""
    rows, columns = _output_size(images, sides, strides, padding)
    (down, across), pads = strides, [(0, 0), *padding, (0, 0)]
    images = jnp.pad(images, pads, constant_values=fill)
    return [
        images[:, i : i + down * (rows - 1) + 1 : down, j : j + across * (columns - 1) + 1 : across]
        for i in range(sides[0])
        for j in range(sides[1])
    ]


def _output_size(
    images: Array, sides: Sequence[int], strides: Sequence[int], padding: Pads
) -> tuple[int, int]:
    """Returns height and width of the output of a convolution."""
    rows, columns = (
        (size + sum(pads) - side) // stride + 1
        for size, side, stride, pads in zip(images.shape[1:3], sides, strides, padding, strict=True)
    )
    return rows, columns
