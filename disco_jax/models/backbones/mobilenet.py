"""MobileNetV2 (arXiv:1801.04381) and MobileNetV3-Large (arXiv:1905.02244).

V2 in torchvision's layout. V3 in three: timm's, which DisCo takes (squeeze-and-excitation after
the activation, epsilon 1e-5); SEED's own port (before the activation where a block expands;
dropout); torchvision's (epsilon 1e-3).
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from disco_jax.models.backbones.inverted import (
    ACTIVATIONS,
    Block,
    Style,
    batch_norm,
    conv,
    divisible,
)
from disco_jax.models.backbones.inverted_stages import InvertedStages
from disco_jax.models.layers.dropout import dropout
from disco_jax.models.layers.initializers import he_fan_out, narrower, zeros

FEATURES = 1280


class MobileNet(InvertedStages, kw_only=True):
    """Inverted residuals up to the features that a classifier reads; see `InvertedStages`.

    Attributes:
      stages: blocks by stage: (kernel, stride, expansion, channels, has squeeze, activation).
      stem_width: channels of the first convolution.
      tail_width: channels of the last one (1x1).
      tail_linear: V3: a linear layer to 1280 and a hard swish after the pool, not a convolution.
      activation: of the stem and the tail.
    """

    stages: tuple[tuple[tuple, ...], ...]
    stem_width: int
    tail_width: int
    tail_linear: bool
    activation: str

    def blocks(self) -> list[list[Block]]:
        """The table of stages with every width worked out."""
        stages: list[list[Block]] = []
        width = self.stem_width
        spared = 1 if self.stem == "small" else 0
        for rows in self.stages:
            stages.append([])
            for kernel, stride, expansion, channels, squeeze, activation in rows:
                if stride == 2 and spared:
                    stride, spared = 1, spared - 1
                expanded = divisible(width * expansion)
                squeezed = divisible(expanded // 4) if squeeze else 0
                stages[-1].append(Block(kernel, stride, expanded, channels, squeezed, activation))
                width = channels
        return stages

    @property
    def out_features(self) -> int:
        """D of its features."""
        return FEATURES

    @nn.compact
    def __call__(self, images: Array, *, norm: str) -> Array:
        """float[B, H, W, 3] -> features f32[B, 1280]."""
        style, act = self.style, ACTIVATIONS[self.activation]
        x = self._staged(images, norm, self.stem_width, self.activation, self.blocks())
        tail = conv(
            style, self.tail_width, 1, 1, 0, False, self.dtype, name="tail_conv",
            convolve=self._convolve,
        )  # fmt: skip
        x = act(batch_norm(style, self.norm_group, self.dtype, name="tail_bn")(tail(x), norm=norm))
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        if self.tail_linear:
            draw = narrower if style.start in ("seed", "torchvision") else he_fan_out
            dense = nn.Dense(
                FEATURES, kernel_init=draw, bias_init=zeros, dtype=self.dtype, name="tail_linear"
            )
            x = act(dense(x)).astype(jnp.float32)
        return dropout(self, x, self.dropout)


def _v2_stages() -> tuple[tuple[tuple, ...], ...]:
    """Table 2 of the paper: expansion, channels, blocks, stride."""
    table = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    return tuple(
        tuple((3, s if i == 0 else 1, t, c, False, "relu6") for i in range(n))
        for t, c, n, s in table
    )


# Table 1 of the paper, grouped by stage.
_V3_STAGES = (
    ((3, 1, 1, 16, False, "relu"),),
    ((3, 2, 4, 24, False, "relu"), (3, 1, 3, 24, False, "relu")),
    ((5, 2, 3, 40, True, "relu"), (5, 1, 3, 40, True, "relu"), (5, 1, 3, 40, True, "relu")),
    (
        (3, 2, 6, 80, False, "hard_swish"),
        (3, 1, 2.5, 80, False, "hard_swish"),
        (3, 1, 2.3, 80, False, "hard_swish"),
        (3, 1, 2.3, 80, False, "hard_swish"),
    ),
    ((3, 1, 6, 112, True, "hard_swish"), (3, 1, 6, 112, True, "hard_swish")),
    (
        (5, 2, 6, 160, True, "hard_swish"),
        (5, 1, 6, 160, True, "hard_swish"),
        (5, 1, 6, 160, True, "hard_swish"),
    ),
)
_V2: dict[str, Any] = dict(
    stages=_v2_stages(),
    stem_width=32,
    tail_width=1280,
    tail_linear=False,
    activation="relu6",
)
_V3: dict[str, Any] = dict(
    stages=_V3_STAGES,
    stem_width=16,
    tail_width=960,
    tail_linear=True,
    activation="hard_swish",
)
_v3_style = functools.partial(Style, gate="hard_sigmoid", squeeze_activation="relu")

VARIANTS: dict[str, dict[str, Any]] = {
    "mobilenetv2": dict(**_V2, style=Style(start="torchvision")),
    "mobilenetv3_large": dict(**_V3, style=_v3_style()),
    "mobilenetv3_large_seed": dict(
        **_V3, style=_v3_style(squeeze_first=True, start="seed"), dropout=0.2
    ),
    "mobilenetv3_large_tv": dict(
        **_V3, style=_v3_style(epsilon=1e-3, momentum=0.99, start="torchvision")
    ),
}
