"""Columns of a map side by side in its channels: full lanes for the few channels of early layers.

A TPU computes on 128 channels at a time, of which the first layers of a small network use a
quarter or less. `c` neighbouring columns of float[B, H, W, C] lie in memory as
float[B, H, W / c, c * C]. There a convolution, depthwise ones too, is a dense one whose kernel is
mostly zeros, which the matrix units do not mind; BatchNorm and squeeze-and-excitation count a
channel's columns together. Weights are those of the layers themselves.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def packed(x: Array, columns: int) -> Array:
    """float[B, H, W, C] -> float[B, H, W / columns, columns * C]."""
    return x.reshape(*x.shape[:2], x.shape[2] // columns, columns * x.shape[3])


def unpacked(x: Array, columns: int) -> Array:
    """Undoes `packed`."""
    return x.reshape(*x.shape[:2], columns * x.shape[2], x.shape[3] // columns)


def tiled(channels: Array, columns: int) -> Array:
    """[..., C] -> [..., columns * C]: what is true of a channel, for all of its columns."""
    return channels if columns == 1 else jnp.concatenate([channels] * columns, axis=-1)


def pooled(channels: Array, columns: int) -> Array:
    """[..., columns * C] -> [..., C]: the mean over a channel's columns."""
    if columns == 1:
        return channels
    return jnp.mean(channels.reshape(*channels.shape[:-1], columns, -1), axis=-2)


class ColumnConv(nn.Module):
    """A biasless convolution of packed maps; its parameters are those of `nn.Conv`.

    Attributes:
      features: channels that leave it.
      side: of the kernel.
      stride: of it, down and across.
      columns: that leave it side by side; stride * columns come in.
      padding: of `jax.lax.conv_general_dilated`, of the maps as they are without packing.
      depthwise: one filter a channel.
      kernel_init: draws float[side, side, C, features].
      dtype: of the computation.
    """

    features: int
    side: int
    stride: int
    columns: int
    padding: str | int | Sequence[tuple[int, int]]
    depthwise: bool
    kernel_init: Callable[..., Array]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """float[B, H, W / (s c), s c C] -> float[B, H / s, W / (s c), c * features]."""
        incoming = self.columns * self.stride
        channels, sides = x.shape[-1] // incoming, (self.side, self.side)
        shape = (*sides, 1 if self.depthwise else channels, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        rows, (low, _) = self._pads((x.shape[1], x.shape[2] * incoming))
        where, across = _places(self.side, self.stride, low, self.columns)
        kernel, reads = kernel.astype(self.dtype), jnp.asarray(where, self.dtype)
        if self.depthwise:
            taps = jnp.einsum("htd,tpio->hpiod", kernel[:, :, 0], reads)
            own = tiled(jnp.eye(self.features, dtype=self.dtype), self.columns)
            dense = jnp.einsum("hpid,cd->hpicd", taps.reshape(*taps.shape[:3], -1), own)
        else:
            dense = jnp.einsum("htcd,tpio->hpicod", kernel, reads)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            dense.reshape(self.side, -1, x.shape[-1], self.columns * self.features),
            (self.stride, 1),
            (rows, across),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def _pads(self, size: tuple[int, int]) -> Sequence[tuple[int, int]]:
        if isinstance(self.padding, str):
            sides, strides = (self.side, self.side), (self.stride, self.stride)
            return jax.lax.padtype_to_pads(size, sides, strides, self.padding)
        if isinstance(self.padding, int):
            return [(self.padding, self.padding)] * 2
        return self.padding


def _places(side: int, stride: int, low: int, columns: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Which column of which pack a tap of the kernel reads, for each column of the result.

    Args:
      side: of the kernel.
      stride: across.
      low: padding on the left.
      columns: of a pack of the result.

    Returns:
      0 or 1 [side, packs, stride * columns, columns], and the padding across, in packs.
    """
    incoming = columns * stride
    reads = stride * np.arange(columns)[None] + np.arange(side)[:, None] - low
    packs, places = np.divmod(reads, incoming)
    first, last = packs.min(), packs.max()
    where = np.zeros((side, last - first + 1, incoming, columns), np.float32)
    for (tap, column), pack in np.ndenumerate(packs):
        where[tap, pack - first, places[tap, column], column] = 1
    return where, (int(-first), int(last))
