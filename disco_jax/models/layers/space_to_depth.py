"""Space-to-depth for the first convolution, as three channels are too few for a matrix unit."""

import jax
import jax.numpy as jnp
from jax import Array


def space_to_depth_conv(
    images: Array,
    kernel: Array,
    strides: tuple[int, ...],
    padding: str | list[tuple[int, int]],
    **kwargs,
) -> Array:
    """Computes a convolution of stride 2 on pairs of columns: the same sums, twice the channels.

    The columns 2j and 2j + 1 of an image become the channels of one column, which keeps their
    order in memory. The kernel gets a column of zeros and the same reshape; the horizontal stride
    becomes 1. Pass it to `nn.Conv` as `conv_general_dilated`, so that parameters keep their shapes.
    Images of odd width and other strides take the plain convolution.

    Args:
      images: float[B, H, W, C].
      kernel: float[h, w, C, F].
      strides: vertical and horizontal stride; only (2, 2) takes pairs of columns.
      padding: as `jax.lax.conv_general_dilated` takes it.
      **kwargs: further arguments of `jax.lax.conv_general_dilated`.

    Returns:
      float[B, ceil(H / 2), ceil(W / 2), F] for the paddings of this package.
    """
    batch, height, width, channels = images.shape
    if tuple(strides) != (2, 2) or width % 2:
        return jax.lax.conv_general_dilated(images, kernel, strides, padding, **kwargs)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads((height, width), kernel.shape[:2], strides, padding)
    vertical, (pad_left, pad_right) = padding
    out_width = (width + pad_left + pad_right - kernel.shape[1]) // 2 + 1
    # Zeros align the kernel with pairs of columns on both sides.
    zeros_left = pad_left % 2
    zeros_right = (zeros_left + kernel.shape[1]) % 2
    kernel = jnp.pad(kernel, ((0, 0), (zeros_left, zeros_right), (0, 0), (0, 0)))
    pairs = kernel.shape[1] // 2
    pad_left = (pad_left + zeros_left) // 2
    horizontal = (pad_left, out_width - 1 + pairs - pad_left - width // 2)
    return jax.lax.conv_general_dilated(
        images.reshape(batch, height, width // 2, 2 * channels),
        kernel.reshape(kernel.shape[0], pairs, 2 * channels, kernel.shape[-1]),
        (2, 1),
        (vertical, horizontal),
        **kwargs,
    )
