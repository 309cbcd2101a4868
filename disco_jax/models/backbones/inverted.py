"""Inverted residuals: the block, and the network of stages of EfficientNets and MobileNets.

One module serves the layouts of several code bases. The place of squeeze-and-excitation, the
padding of convolutions and BatchNorm's epsilon are fields of `Style`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
from jax import Array

from disco_jax.models.backbones.backbone import Backbone
from disco_jax.models.layers.activations import ACTIVATIONS, Activation
from disco_jax.models.layers.compute import Compute
from disco_jax.models.layers.dropout import drop_path
from disco_jax.models.layers.feature_maps import FeatureMap, record_stage
from disco_jax.models.layers.initializers import (
    he_fan_out,
    he_fan_out_depthwise,
    narrower,
    torch_bias,
    torch_kernel,
    zeros,
)

PADDINGS = ("symmetric", "same", "static")
GATES: dict[str, Activation] = {"sigmoid": nn.sigmoid, "hard_sigmoid": nn.hard_sigmoid}


@dataclasses.dataclass(frozen=True)
class Style:
    """Conventions of a code base, shared by all of its blocks.

    Attributes:
      padding: "symmetric", (k - 1) / 2 on all sides; "same", TensorFlow's, which follows from the
        size of the input; "static", TensorFlow's for the nominal size of the network, whatever
        the input.
      epsilon: BatchNorm's epsilon.
      momentum: BatchNorm's momentum, the weight of the old statistics.
      gate: last activation of squeeze-and-excitation, a key of `GATES`.
      squeeze_activation: activation between its two layers; "": that of the block.
      squeeze_first: whether it precedes the activation of the depthwise convolution in blocks that
        expand.
      start: initial values: "timm", "torchvision", "seed" or "torch" (PyTorch's defaults).
    """

    padding: str = "symmetric"
    epsilon: float = 1e-5
    momentum: float = 0.9
    gate: str = "sigmoid"
    squeeze_activation: str = ""
    squeeze_first: bool = False
    start: str = "timm"

    def conv_bn_options(
        self, kernel: int = 1, stride: int = 1, size: int = 0, depthwise: bool = False
    ) -> dict[str, Any]:
        """Returns the arguments of `Compute.conv_bn` that the code base decides.

        Args:
          kernel: side of the kernel.
          stride: stride of the convolution.
          size: nominal size of its input in px, for "static" padding.
          depthwise: whether the convolution is depthwise.
        """
        pads: Any = self.padding
        if self.padding == "static":
            pads = static_padding(kernel, stride, size)
        return dict(
            padding=pads,
            kernel_init=self._kernel_init(depthwise),
            epsilon=self.epsilon,
            momentum=self.momentum,
        )

    def _kernel_init(self, depthwise: bool):
        if self.start == "torch":
            return torch_kernel
        return he_fan_out_depthwise if depthwise and self.start == "timm" else he_fan_out


@dataclasses.dataclass(frozen=True)
class Block:
    """A row of an architecture table.

    Attributes:
      kernel: side of the depthwise convolution.
      stride: stride of the depthwise convolution.
      expanded: channels of the depthwise convolution; those of the input for no expansion.
      channels: channels of the output.
      squeeze: width inside squeeze-and-excitation; 0: the block has none.
      activation: a key of `ACTIVATIONS`.
    """

    kernel: int
    stride: int
    expanded: int
    channels: int
    squeeze: int
    activation: str


class InvertedResidual(nn.Module):
    """Expand (1x1), depthwise, squeeze-and-excitation, project (1x1), beside the identity.

    MobileNetV2 (arXiv:1801.04381) fig. 4 and MobileNetV3 (arXiv:1905.02244) fig. 4.

    Attributes:
      block: shape of the block.
      style: conventions of the code base.
      nominal: nominal size of the input in px, for "static" padding.
      drop: probability that the branch of an image is dropped while training.
      compute: how layers are computed.
    """

    block: Block
    style: Style
    nominal: int
    drop: float
    compute: Compute

    @nn.compact
    def __call__(self, inputs: FeatureMap, *, norm: str) -> FeatureMap:
        """Maps float[B, H, W, C] to float[B, H / stride, W / stride, channels], rounded up."""
        block, x = self.block, inputs
        activation = ACTIVATIONS[block.activation]
        expands = block.expanded != inputs.channels
        if expands:
            x = self._conv_bn(x, block.expanded, norm, "expand").map(activation)
        x = self._conv_bn(
            x, block.expanded, norm, "depthwise", block.kernel, block.stride, depthwise=True
        )
        if expands and self.style.squeeze_first:
            x = self._squeeze(x).map(activation)
        else:
            x = self._squeeze(x.map(activation))
        x = self._conv_bn(x, block.channels, norm, "project")
        if block.stride == 1 and inputs.channels == block.channels:
            x = inputs + x.map(lambda branch: drop_path(self, branch, self.drop))
        return x

    def _conv_bn(
        self,
        x: FeatureMap,
        features: int,
        norm: str,
        name: str,
        kernel: int = 1,
        stride: int = 1,
        depthwise: bool = False,
    ) -> FeatureMap:
        return self.compute.conv_bn(
            x, features, kernel, stride, norm=norm, names=(f"{name}_conv", f"{name}_bn"),
            depthwise=depthwise,
            **self.style.conv_bn_options(kernel, stride, self.nominal, depthwise),
        )  # fmt: skip

    def _squeeze(self, x: FeatureMap) -> FeatureMap:
        if not self.block.squeeze:
            return x
        return SqueezeExcite(
            self.block.squeeze,
            ACTIVATIONS[self.style.squeeze_activation or self.block.activation],
            GATES[self.style.gate],
            self.style.start,
            self.compute,
            name="squeeze",
        )(x)


class SqueezeExcite(nn.Module):
    """Scales channels by a function of their means: two linear layers (arXiv:1709.01507).

    Attributes:
      width: width between the two layers.
      activation: activation between the two layers.
      gate: activation after the second layer.
      start: initial values, see `Style.start`.
      compute: how layers are computed.
    """

    width: int
    activation: Activation
    gate: Activation
    start: str
    compute: Compute

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Scales float[B, H, W, C]."""
        means = x.global_average().astype(self.compute.dtype)
        hidden = self.activation(self._linear(self.width, means.shape[-1], "reduce")(means))
        gate = self.gate(self._linear(means.shape[-1], self.width, "expand")(hidden))
        return x.scale_channels(gate)

    def _linear(self, width: int, fan_in: int, name: str) -> nn.Dense:
        kernel, bias = {
            "timm": (he_fan_out, zeros),  # 1x1 convolutions there
            "torchvision": (he_fan_out, zeros),
            "seed": (narrower, zeros),
            "torch": (torch_kernel, torch_bias(fan_in)),
        }[self.start]
        return nn.Dense(
            width, kernel_init=kernel, bias_init=bias, dtype=self.compute.dtype, name=name
        )


class InvertedNetwork(Backbone):
    """Base class of networks with a first convolution and stages of inverted residuals.

    Attributes:
      style: conventions of the code base.
      dropout: dropout rate of the features.
      stem: "imagenet"; or "small" for 16 to 64 px, with stride 1 in the stem and in the first
        strided stage, a quarter of the reduction, as in ResNets.
    """

    style: Style = Style()
    dropout: float = 0.0
    stem: str = "imagenet"
    probe_rate: ClassVar[float] = 3.0

    def blocks(self) -> list[list[Block]]:
        """Returns the blocks of each stage."""
        raise NotImplementedError

    def _stages(
        self,
        images: Array,
        norm: str,
        width: int,
        activation: str,
        nominal: int = 0,
        drop_path: float = 0.0,
    ) -> FeatureMap:
        """Computes the first convolution and all blocks.

        Args:
          images: float[B, H, W, 3], normalized.
          norm: mode of BatchNorm.
          width: channels of the first convolution.
          activation: activation after the first convolution, a key of `ACTIVATIONS`.
          nominal: image size in px that "static" padding assumes.
          drop_path: stochastic depth of the last block; grows linearly from 0 at the first block.
        """
        stride = 1 if self.stem == "small" else 2
        x = self.compute.stem(
            images, width, 3, stride, norm=norm, names=("stem_conv", "stem_bn"),
            activation=ACTIVATIONS[activation],
            **self.style.conv_bn_options(3, stride, nominal),
        )  # fmt: skip
        stages = self.blocks()
        size, index, count = strided_size(nominal, stride), 0, sum(map(len, stages))
        for stage, blocks in enumerate(stages):
            for i, block in enumerate(blocks):
                residual = InvertedResidual(
                    block,
                    self.style,
                    size,
                    drop_path * index / count,
                    self.compute,
                    name=f"block{stage}_{i}",
                )
                x = residual(x, norm=norm)
                size, index = strided_size(size, block.stride), index + 1
            record_stage(self, stage, x)
        return x

    def _last_conv(self, x: FeatureMap, width: int, norm: str, name: str) -> FeatureMap:
        """Computes the last 1x1 convolution and its BatchNorm."""
        return self.compute.conv_bn(
            x, width, 1, norm=norm, names=(f"{name}_conv", f"{name}_bn"),
            **self.style.conv_bn_options(),
        )  # fmt: skip


def without_first_stride(stages: Sequence[Sequence[Block]]) -> list[list[Block]]:
    """Returns stages whose first block of stride 2 has stride 1 instead, for small stems."""
    first = next((block for blocks in stages for block in blocks if block.stride == 2), None)
    return [
        [dataclasses.replace(block, stride=1) if block is first else block for block in blocks]
        for blocks in stages
    ]


def divisible(channels: float, by: int = 8) -> int:
    """Rounds `channels` to a multiple of `by`, never down by more than a tenth."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded


def strided_size(size: int, stride: int) -> int:
    """Returns the output size of a convolution with TensorFlow's padding."""
    return -(-size // stride)


def static_padding(kernel: int, stride: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns TensorFlow's padding of an input of `size` px: ((top, bottom), (left, right))."""
    total = max((strided_size(size, stride) - 1) * stride + kernel - size, 0)
    low = total // 2
    return (low, total - low), (low, total - low)
