"""EfficientNets B0 and B1 (arXiv:1905.11946), in the layouts of two code bases.

timm's, which DisCo takes: symmetric padding, BatchNorm's epsilon 1e-5. SEED's own and BINGO's
(a port of TensorFlow's): padding fixed for the nominal image size, epsilon 1e-3, momentum 0.99,
dropout and stochastic depth while training. And timm's `tf_` form of the same weights, whose
padding follows the input.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from disco_jax.models.columns import packed, unpacked
from disco_jax.models.drop import dropout
from disco_jax.models.inverted import (
    Block,
    InvertedResidual,
    Style,
    batch_norm,
    conv,
    shrink,
)
from disco_jax.models.maps import keep as keep_map
from disco_jax.models.stem import by_pairs

STEM, FEATURES = 32, 1280
# Table 1: kernel, stride, expansion, channels of a stage.
_STAGES = (
    (3, 1, 1, 16),
    (3, 2, 6, 24),
    (5, 2, 6, 40),
    (3, 2, 6, 80),
    (5, 1, 6, 112),
    (5, 2, 6, 192),
    (3, 1, 6, 320),
)
_LAST_PACKED = 2, 0  # stage and block: further on, depthwise convolutions as dense ones cost more


class EfficientNet(nn.Module):
    """EfficientNet up to the global average pool.

    Attributes:
      repeats: blocks of each of the seven stages.
      style: of the code base.
      nominal: image size in px that "static" padding assumes.
      drop_path: stochastic depth of the last block; grows linearly from 0 at the first.
      dropout: of the features.
      stem: "imagenet"; or "small" for 16 to 64 px: strides 1 in the stem and the first
        strided stage, a quarter of the reduction, as the small ResNets have it.
      norm_group: see `BatchNorm.group`.
      pairs: the first convolution takes columns by pairs, see `stem.by_pairs`.
      columns: that lie side by side in the channels up to the third stage's first block; at the
        start they fill a quarter of a TPU's lanes. See `columns.packed`. 1, or images
        have another width: none do.
      dtype: of the computation; parameters stay float32.
    """

    repeats: tuple[int, ...]
    style: Style = Style()
    nominal: int = 224
    drop_path: float = 0.0
    dropout: float = 0.0
    stem: str = "imagenet"
    norm_group: int = 0
    pairs: bool = True
    columns: int = 1
    dtype: jnp.dtype = jnp.float32

    def blocks(self) -> list[list[Block]]:
        """The table of stages, written out block by block."""
        width, stages = STEM, []
        spared = 1 if self.stem == "small" else 0
        for (kernel, stride, expansion, channels), count in zip(_STAGES, self.repeats, strict=True):
            if stride == 2 and spared:
                stride, spared = 1, spared - 1
            stages.append([])
            for i in range(count):
                stages[-1].append(
                    Block(
                        kernel,
                        stride if i == 0 else 1,
                        width * expansion,
                        channels,
                        squeeze=width // 4,  # of the input, not of the expanded channels
                        activation="swish",
                    )
                )
                width = channels
        return stages

    @property
    def packing(self) -> int:
        """The `columns` that fill a TPU's lanes."""
        return 4

    @property
    def out_features(self) -> int:
        """D of its features."""
        return FEATURES

    @nn.compact
    def __call__(self, images: Array, *, norm: str) -> Array:
        """float[B, H, W, 3] -> features f32[B, 1280] after the global average pool."""
        stride = 1 if self.stem == "small" else 2
        style, size = self.style, self.nominal
        columns = 1 if images.shape[2] % (stride * self.columns) else self.columns
        x = packed(images.astype(self.dtype), stride * columns if columns > 1 else 1)
        first = by_pairs if self.pairs else None
        x = conv(
            style, STEM, 3, stride, size, False, self.dtype, name="stem_conv", convolve=first,
            columns=stride * columns if columns > 1 else 1,
        )(x)  # fmt: skip
        size = shrink(size, stride)
        norm_of = functools.partial(batch_norm, style, self.norm_group, self.dtype)
        x = nn.swish(norm_of(name="stem_bn", columns=columns)(x, norm=norm))
        stages, done, total = self.blocks(), 0, sum(self.repeats)
        for s, blocks in enumerate(stages):
            for i, block in enumerate(blocks):
                x = InvertedResidual(
                    block,
                    style,
                    size,
                    self.norm_group,
                    self.drop_path * done / total,
                    self.dtype,
                    columns,
                    name=f"block{s}_{i}",
                )(x, norm=norm)
                columns = max(columns // block.stride, 1)
                if (s, i) == _LAST_PACKED:
                    x, columns = unpacked(x, columns), 1
                size, done = shrink(size, block.stride), done + 1
            keep_map(self, s, unpacked(x, columns))
        x = conv(style, FEATURES, 1, 1, size, False, self.dtype, name="head_conv")(x)
        x = nn.swish(norm_of(name="head_bn")(x, norm=norm))
        return dropout(self, jnp.mean(x.astype(jnp.float32), axis=(1, 2)), self.dropout)


_B0 = (1, 2, 2, 3, 3, 4, 1)
_B1 = (2, 3, 3, 4, 4, 5, 2)  # ceil(1.1 n)
_PORT = dict(
    style=Style(padding="static", epsilon=1e-3, momentum=0.99, start="torch"),
    drop_path=0.2,
    dropout=0.2,
)
_TF = dict(style=Style(padding="same", epsilon=1e-3, momentum=0.99))

VARIANTS = {
    "efficientnet_b0": dict(repeats=_B0),
    "efficientnet_b1": dict(repeats=_B1),
    "efficientnet_b0_seed": dict(repeats=_B0, nominal=224, **_PORT),
    "efficientnet_b1_seed": dict(repeats=_B1, nominal=240, **_PORT),
    "tf_efficientnet_b0": dict(repeats=_B0, **_TF),
    "tf_efficientnet_b1": dict(repeats=_B1, **_TF),
}
