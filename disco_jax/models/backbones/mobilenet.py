"""MobileNetV2 (arXiv:1801.04381) and MobileNetV3-Large (arXiv:1905.02244).

V2 has torchvision's layout. V3 has three: timm's, which DisCo uses (squeeze-and-excitation after
the activation, epsilon 1e-5); SEED's own port (squeeze-and-excitation before the activation in
blocks that expand; dropout); torchvision's (epsilon 1e-3).
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from disco_jax.models.backbones.inverted import (
    Block,
    InvertedNetwork,
    Style,
    divisible,
    without_first_stride,
)
from disco_jax.models.layers.activations import ACTIVATIONS
from disco_jax.models.layers.dropout import dropout
from disco_jax.models.layers.initializers import he_fan_out, narrower, zeros

FEATURES = 1280


class MobileNet(InvertedNetwork, kw_only=True):
    """MobileNet up to the input of the classifier; see `InvertedNetwork` for further attributes.

    Attributes:
      stages: blocks by stage: (kernel, stride, expansion, channels, has squeeze, activation).
      stem_width: channels of the first convolution.
      tail_width: channels of the last convolution (1x1).
      tail_linear: whether a linear layer to 1280 and the activation follow the pool (V3).
      activation: activation of the stem and the tail.
    """

    stages: tuple[tuple[tuple, ...], ...]
    stem_width: int
    tail_width: int
    tail_linear: bool
    activation: str

    def blocks(self) -> list[list[Block]]:
        """Returns the blocks of each stage, with all widths computed."""
        stages: list[list[Block]] = []
        width = self.stem_width
        for rows in self.stages:
            stages.append([])
            for kernel, stride, expansion, channels, squeeze, activation in rows:
                expanded = divisible(width * expansion)
                squeezed = divisible(expanded // 4) if squeeze else 0
                stages[-1].append(Block(kernel, stride, expanded, channels, squeezed, activation))
                width = channels
        return without_first_stride(stages) if self.stem == "small" else stages

    @property
    def out_features(self) -> int:
        """Number of features."""
        return FEATURES

    @nn.compact
    def __call__(self, images: Array, *, norm: str) -> Array:
        """Maps float[B, H, W, 3] to f32[B, 1280]."""
        activation = ACTIVATIONS[self.activation]
        x = self._stages(images, norm, self.stem_width, self.activation)
        x = self._last_conv(x, self.tail_width, norm, "tail").map(activation)
        features = x.global_average()
        if self.tail_linear:
            features = activation(self._tail_linear()(features)).astype(jnp.float32)
        return dropout(self, features, self.dropout)

    def _tail_linear(self) -> nn.Dense:
        kernel_init = narrower if self.style.start in ("seed", "torchvision") else he_fan_out
        return nn.Dense(
            FEATURES,
            kernel_init=kernel_init,
            bias_init=zeros,
            dtype=self.compute.dtype,
            name="tail_linear",
        )


def _v2_stages() -> tuple[tuple[tuple, ...], ...]:
    """Returns the stages of MobileNetV2, written out from table 2 of the paper."""
    table = (  # expansion, channels, blocks, stride
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    return tuple(
        tuple(
            (3, stride if i == 0 else 1, expansion, channels, False, "relu6") for i in range(count)
        )
        for expansion, channels, count, stride in table
    )


# Table 1 of the paper, grouped by stage: the columns are those of `MobileNet.stages`.
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

FAMILY = MobileNet
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
