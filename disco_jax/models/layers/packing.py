"""Packing of adjacent columns into channels, so that early layers fill the lanes of a TPU.

A TPU computes on 128 channels at a time. The first layers of a small network have 32 or fewer.
Packing p columns stores float[B, H, W, C] as float[B, H, W / p, p * C], which has
the same order in memory. A convolution of packed maps, also a depthwise one, is a dense
convolution whose kernel is mostly zeros; matrix units compute it at no extra cost while lanes are
free. Statistics of a channel are taken over all of its columns. Parameters keep their shapes.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Padding = str | int | Sequence[tuple[int, int]]


def pack_width(x: Array, packing: int) -> Array:
    """Reshapes float[B, H, W, C] to float[B, H, W / packing, packing * C]."""
    return x.reshape(*x.shape[:2], x.shape[2] // packing, packing * x.shape[3])


def unpack_width(x: Array, packing: int) -> Array:
    """Inverts `pack_width`."""
    return x.reshape(*x.shape[:2], packing * x.shape[2], x.shape[3] // packing)


def repeat_channels(channels: Array, packing: int) -> Array:
    """Repeats values per channel for each packed column: [..., C] -> [..., packing * C]."""
    return channels if packing == 1 else jnp.concatenate([channels] * packing, axis=-1)


def average_columns(channels: Array, packing: int) -> Array:
    """Averages over the packed columns of each channel: [..., packing * C] -> [..., C]."""
    if packing == 1:
        return channels
    return jnp.mean(channels.reshape(*channels.shape[:-1], packing, -1), axis=-2)


class PackedConv(nn.Module):
    """A biasless convolution of packed maps with the parameters of `nn.Conv`.

    Attributes:
      features: output channels.
      side: side of the kernel.
      stride: stride along both axes.
      width_packing: packed columns of the output; the input packs stride * width_packing.
      padding: padding of the unpacked maps, as `jax.lax.conv_general_dilated` takes it, or an int.
      depthwise: whether each channel is convolved with one filter, without mixing channels.
      kernel_init: initializer of float[side, side, C, features].
      dtype: dtype of the computation.
    """

    features: int
    side: int
    stride: int
    width_packing: int
    padding: Padding
    depthwise: bool
    kernel_init: Callable[..., Array]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Convolves x.

        Args:
          x: float[B, H, W / (s p), s p C] with the stride s and p = `width_packing`.

        Returns:
          float[B, H / s, W / (s p), p * features].
        """
        packing_in = self.width_packing * self.stride
        channels, sides = x.shape[-1] // packing_in, (self.side, self.side)
        shape = (*sides, 1 if self.depthwise else channels, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        vertical, (pad_left, _) = self._pads((x.shape[1], x.shape[2] * packing_in))
        tap_mask, horizontal = _tap_selection(self.side, self.stride, pad_left, self.width_packing)
        kernel, selection = kernel.astype(self.dtype), jnp.asarray(tap_mask, self.dtype)
        if self.depthwise:
            taps = jnp.einsum("htd,tpio->hpiod", kernel[:, :, 0], selection)
            diagonal = jnp.eye(self.features, dtype=self.dtype)
            diagonal = repeat_channels(diagonal, self.width_packing)
            taps = taps.reshape(*taps.shape[:3], -1)
            dense = jnp.einsum("hpid,cd->hpicd", taps, diagonal)
        else:
            dense = jnp.einsum("htcd,tpio->hpicod", kernel, selection)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            dense.reshape(self.side, -1, x.shape[-1], self.width_packing * self.features),
            (self.stride, 1),
            (vertical, horizontal),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def _pads(self, size: tuple[int, int]) -> Sequence[tuple[int, int]]:
        """Returns ((top, bottom), (left, right)) padding of unpacked maps of `size`."""
        if isinstance(self.padding, str):
            sides, strides = (self.side, self.side), (self.stride, self.stride)
            return jax.lax.padtype_to_pads(size, sides, strides, self.padding)
        if isinstance(self.padding, int):
            return [(self.padding, self.padding)] * 2
        return self.padding


def _tap_selection(
    side: int, stride: int, pad_left: int, packing: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """Locates the input column that each horizontal tap of the kernel reads.

    Args:
      side: side of the kernel.
      stride: horizontal stride.
      pad_left: padding of the unpacked map on the left.
      packing: packed columns of the output.

    Returns:
      selection: f32[side, packs, stride * packing, packing] of 0 and 1. Entry (tap, pack, i, o) is
        1 if the tap reads column i of that pack to compute column o of an output pack.
      padding: (left, right) padding of the packed map, in packs.
    """
    packing_in = packing * stride
    reads = stride * np.arange(packing)[None] + np.arange(side)[:, None] - pad_left
    packs, offsets = np.divmod(reads, packing_in)
    first, last = packs.min(), packs.max()
    selection = np.zeros((side, last - first + 1, packing_in, packing), np.float32)
    for (tap, column), pack in np.ndenumerate(packs):
        selection[tap, pack - first, offsets[tap, column], column] = 1
    return selection, (int(-first), int(last))
