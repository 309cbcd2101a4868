"""EfficientNets B0 and B1 (arXiv:1905.11946), in the layouts of two code bases.

timm's, which DisCo takes: symmetric padding, BatchNorm's epsilon 1e-5. SEED's own and BINGO's
(a port of TensorFlow's): padding fixed for the nominal image size, epsilon 1e-3, momentum 0.99,
dropout and stochastic depth while training. And timm's `tf_` form of the same weights, whose
padding follows the input.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from disco_jax.models.backbones.inverted import Block, Style, batch_norm, conv
from disco_jax.models.backbones.inverted_stages import InvertedStages
from disco_jax.models.layers.dropout import dropout

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


class EfficientNet(InvertedStages, kw_only=True):
    """EfficientNet up to the global average pool; further attributes in `InvertedStages`.

    Attributes:
      repeats: blocks of each of the seven stages.
      nominal: image size in px that "static" padding assumes.
      drop_path: stochastic depth of the last block; grows linearly from 0 at the first.
    """

    repeats: tuple[int, ...]
    nominal: int = 224
    drop_path: float = 0.0

    def blocks(self) -> list[list[Block]]:
        """The table of stages, written out block by block."""
        stages: list[list[Block]] = []
        width = STEM
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
    def out_features(self) -> int:
        """D of its features."""
        return FEATURES

    @nn.compact
    def __call__(self, images: Array, *, norm: str) -> Array:
        """float[B, H, W, 3] -> features f32[B, 1280] after the global average pool."""
        x = self._staged(images, norm, STEM, "swish", self.blocks(), self.nominal, self.drop_path)
        head = conv(
            self.style, FEATURES, 1, 1, 0, False, self.dtype, name="head_conv",
            convolve=self._convolve,
        )  # fmt: skip
        x = batch_norm(self.style, self.norm_group, self.dtype, name="head_bn")(head(x), norm=norm)
        x = jnp.mean(nn.swish(x).astype(jnp.float32), axis=(1, 2))
        return dropout(self, x, self.dropout)


_B0 = (1, 2, 2, 3, 3, 4, 1)
_B1 = (2, 3, 3, 4, 4, 5, 2)  # ceil(1.1 n)
_PORT: dict[str, Any] = dict(
    style=Style(padding="static", epsilon=1e-3, momentum=0.99, start="torch"),
    drop_path=0.2,
    dropout=0.2,
)
_TF: dict[str, Any] = dict(style=Style(padding="same", epsilon=1e-3, momentum=0.99))

VARIANTS: dict[str, dict[str, Any]] = {
    "efficientnet_b0": dict(repeats=_B0),
    "efficientnet_b1": dict(repeats=_B1),
    "efficientnet_b0_seed": dict(repeats=_B0, nominal=224, **_PORT),
    "efficientnet_b1_seed": dict(repeats=_B1, nominal=240, **_PORT),
    "tf_efficientnet_b0": dict(repeats=_B0, **_TF),
    "tf_efficientnet_b1": dict(repeats=_B1, **_TF),
}
