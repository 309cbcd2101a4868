"""A first convolution and stages of inverted residuals: what EfficientNets and MobileNets share."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from disco_jax.models.backbones.inverted import (
    ACTIVATIONS,
    Block,
    InvertedResidual,
    Style,
    batch_norm,
    conv,
    shrink,
)
from disco_jax.models.layers.feature_maps import keep as keep_map
from disco_jax.models.layers.packing import packed, unpacked
from disco_jax.models.layers.shifts import by_shifts
from disco_jax.models.layers.space_to_depth import by_pairs

# Stage and block that take columns side by side, the last ones: further on depthwise convolutions
# as dense ones cost more than the lanes that stay empty.
_LAST_PACKED = 2, 0


class InvertedStages(nn.Module):
    """What comes before a network's last convolutions; subclasses have the table of blocks.

    Attributes:
      style: of the code base.
      dropout: of the features.
      stem: "imagenet"; or "small" for 16 to 64 px: strides 1 in the stem and the first
        strided stage, a quarter of the reduction, as the small ResNets have it.
      norm_group: see `BatchNorm.group`.
      pairs: the first convolution takes columns by pairs, see `space_to_depth.by_pairs`.
      columns: that lie side by side in the channels of the first layers, which fill a part of a
        TPU's lanes at the start; see `packing.packed`. 1, or images have another width: none do.
      shifts: convolutions behind the first are made as CPUs are quick at them, see
        `shifts.by_shifts`.
      dtype: of the computation; parameters stay float32.
    """

    style: Style = Style()
    dropout: float = 0.0
    stem: str = "imagenet"
    norm_group: int = 0
    pairs: bool = True
    columns: int = 1
    shifts: bool = False
    dtype: jnp.dtype = jnp.float32

    def _staged(
        self,
        images: Array,
        norm: str,
        width: int,
        activation: str,
        stages: Sequence[Sequence[Block]],
        nominal: int = 0,
        drop_path: float = 0.0,
    ) -> Array:
        """float[B, H, W, 3] -> the last stage's map.

        Args:
          images: normalised.
          norm: see `BatchNorm`.
          width: channels of the first convolution.
          activation: behind it, a key of `ACTIVATIONS`.
          stages: of blocks.
          nominal: image size in px that "static" padding assumes.
          drop_path: stochastic depth of the last block; grows linearly from 0 at the first.
        """
        size, done, total = shrink(nominal, self._stride), 0, sum(map(len, stages))
        x, columns = self._stem(images, norm, width, activation, nominal)
        for s, blocks in enumerate(stages):
            for i, block in enumerate(blocks):
                x = InvertedResidual(
                    block,
                    self.style,
                    size,
                    self.norm_group,
                    drop_path * done / total,
                    self.dtype,
                    columns,
                    self._convolve,
                    name=f"block{s}_{i}",
                )(x, norm=norm)
                columns = max(columns // block.stride, 1)
                if (s, i) == _LAST_PACKED:
                    x, columns = unpacked(x, columns), 1
                size, done = shrink(size, block.stride), done + 1
            keep_map(self, s, unpacked(x, columns))
        return x

    @property
    def packing(self) -> int:
        """The `columns` that fill a TPU's lanes."""
        return 4

    @property
    def _convolve(self) -> Callable[..., Array] | None:
        """Computes convolutions in place of XLA's own."""
        return by_shifts if self.shifts else None

    @property
    def _stride(self) -> int:
        """Of the first convolution."""
        return 1 if self.stem == "small" else 2

    def _stem(self, images: Array, norm: str, width: int, activation: str, nominal: int):
        """What the first stage reads, and how many of its columns lie side by side."""
        stride = self._stride
        columns = 1 if images.shape[2] % (stride * self.columns) else self.columns
        incoming = stride * columns if columns > 1 else 1
        first = by_pairs if self.pairs else None
        x = conv(
            self.style, width, 3, stride, nominal, False, self.dtype, name="stem_conv",
            convolve=first, columns=incoming,
        )(packed(images.astype(self.dtype), incoming))  # fmt: skip
        norm_of = batch_norm(
            self.style, self.norm_group, self.dtype, name="stem_bn", columns=columns
        )
        return ACTIVATIONS[activation](norm_of(x, norm=norm)), columns
