"""EfficientNets B0 and B1 (arXiv:1905.11946) in the layouts of three code bases.

- timm's, which DisCo uses: symmetric padding, BatchNorm's epsilon 1e-5.
- The port of TensorFlow's that SEED and BINGO use: padding for the nominal image size, epsilon
  1e-3, momentum 0.99, dropout and stochastic depth while training.
- timm's `tf_` form of TensorFlow's weights, whose padding follows the input.
"""

from typing import Any

import flax.linen as nn
from jax import Array

from disco_jax.models.backbones.inverted import (
    Block,
    InvertedNetwork,
    Style,
    without_first_stride,
)
from disco_jax.models.layers.dropout import dropout

STEM, FEATURES = 32, 1280
# Table 1: kernel, stride, expansion and channels of each stage.
_STAGES = (
    (3, 1, 1, 16),
    (3, 2, 6, 24),
    (5, 2, 6, 40),
    (3, 2, 6, 80),
    (5, 1, 6, 112),
    (5, 2, 6, 192),
    (3, 1, 6, 320),
)


class EfficientNet(InvertedNetwork, kw_only=True):
    """EfficientNet up to the global average pool; see `InvertedNetwork` for further attributes.

    Attributes:
      repeats: blocks of each of the seven stages.
      nominal: image size in px that "static" padding assumes.
      drop_path: stochastic depth of the last block; grows linearly from 0 at the first block.
    """

    repeats: tuple[int, ...]
    nominal: int = 224
    drop_path: float = 0.0

    def blocks(self) -> list[list[Block]]:
        """Returns the blocks of each stage."""
        stages: list[list[Block]] = []
        width = STEM
        for (kernel, stride, expansion, channels), count in zip(_STAGES, self.repeats, strict=True):
            stages.append([])
            for i in range(count):
                block = Block(
                    kernel,
                    stride if i == 0 else 1,
                    width * expansion,
                    channels,
                    squeeze=width // 4,  # a quarter of the input, not of the expanded channels
                    activation="swish",
                )
                stages[-1].append(block)
                width = channels
        return without_first_stride(stages) if self.stem == "small" else stages

    @property
    def out_features(self) -> int:
        """Number of features."""
        return FEATURES

    @nn.compact
    def __call__(self, images: Array, *, norm: str) -> Array:
        """Maps float[B, H, W, 3] to f32[B, 1280]."""
        x = self._stages(images, norm, STEM, "swish", self.nominal, self.drop_path)
        x = self._last_conv(x, FEATURES, norm, "head").map(nn.swish)
        return dropout(self, x.global_average(), self.dropout)


_B0 = (1, 2, 2, 3, 3, 4, 1)
_B1 = (2, 3, 3, 4, 4, 5, 2)  # ceil(1.1 n)
_PORT: dict[str, Any] = dict(
    style=Style(padding="static", epsilon=1e-3, momentum=0.99, start="torch"),
    drop_path=0.2,
    dropout=0.2,
)
_TF: dict[str, Any] = dict(style=Style(padding="same", epsilon=1e-3, momentum=0.99))

FAMILY = EfficientNet
VARIANTS: dict[str, dict[str, Any]] = {
    "efficientnet_b0": dict(repeats=_B0),
    "efficientnet_b1": dict(repeats=_B1),
    "efficientnet_b0_seed": dict(repeats=_B0, nominal=224, **_PORT),
    "efficientnet_b1_seed": dict(repeats=_B1, nominal=240, **_PORT),
    "tf_efficientnet_b0": dict(repeats=_B0, **_TF),
    "tf_efficientnet_b1": dict(repeats=_B1, **_TF),
}
