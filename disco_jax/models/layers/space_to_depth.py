"""The first convolution of a network: three channels are few for a matrix unit."""

import jax
import jax.numpy as jnp
from jax import Array


def by_pairs(
    images: Array,
    kernel: Array,
    strides: tuple[int, ...],
    padding: str | list[tuple[int, int]],
    **rest,
) -> Array:
    """A strided convolution with columns taken two at a time: the same sums, twice the channels.

    The columns 2j and 2j + 1 of an image are the channels of one column, which is how they lie in
    memory; the kernel, with a column of zeros, is folded alike, and the stride across is 1. To
    be given to `nn.Conv` as its `conv_general_dilated`, so that its parameters stay as they are.
    Images of odd width, and other strides, go through the plain convolution.

    Args:
      images: float[B, H, W, C].
      kernel: float[h, w, C, F].
      strides: (2, 2) to act at all.
      padding: of `jax.lax.conv_general_dilated`, as `rest`.

    Returns:
      float[B, ceil(H / 2), ceil(W / 2), F] for the paddings of this package.
    """
    batch, height, width, channels = images.shape
    if tuple(strides) != (2, 2) or width % 2:
        return jax.lax.conv_general_dilated(images, kernel, strides, padding, **rest)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads((height, width), kernel.shape[:2], strides, padding)
    rows, (low, high) = padding
    made = (width + low + high - kernel.shape[1]) // 2 + 1  # columns of the result
    left = low % 2
    kernel = jnp.pad(kernel, ((0, 0), (left, (left + kernel.shape[1]) % 2), (0, 0), (0, 0)))
    pairs = kernel.shape[1] // 2
    low = (low + left) // 2
    across = (low, made - 1 + pairs - low - width // 2)
    return jax.lax.conv_general_dilated(
        images.reshape(batch, height, width // 2, 2 * channels),
        kernel.reshape(kernel.shape[0], pairs, 2 * channels, kernel.shape[-1]),
        (2, 1),
        (rows, across),
        **rest,
    )
