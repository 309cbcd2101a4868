"""The inverted residual block that EfficientNets and MobileNets are made of, and its parts.

One module for the layouts of several code bases: where the squeeze-and-excitation stands, how
the convolutions pad and what BatchNorm adds to the variance are fields of `Style`.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from disco_jax.models.layers.dropout import drop_path
from disco_jax.models.layers.initializers import (
    he_fan_out,
    he_fan_out_depthwise,
    narrower,
    torch_bias,
    torch_kernel,
    zeros,
)
from disco_jax.models.layers.norm import BatchNorm
from disco_jax.models.layers.packing import ColumnConv, pooled, tiled

PADDINGS = ("symmetric", "same", "static")
Activation = Callable[[Array], Array]
ACTIVATIONS: dict[str, Activation] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "swish": nn.swish,
    "hard_swish": nn.hard_swish,
    "gelu": functools.partial(nn.gelu, approximate=False),
}
GATES: dict[str, Activation] = {"sigmoid": nn.sigmoid, "hard_sigmoid": nn.hard_sigmoid}


@dataclasses.dataclass(frozen=True)
class Style:
    """What a code base decides for all of its blocks.

    Attributes:
      padding: "symmetric", (k - 1) / 2 on both sides; "same", TensorFlow's, which follows from
        the size of the input; "static", TensorFlow's for the network's nominal size, whatever the
        input.
      epsilon: of BatchNorm.
      momentum: of BatchNorm, the share of the old statistics kept.
      gate: what ends the squeeze-and-excitation.
      squeeze_activation: between its two layers; "": the block's own.
      squeeze_first: it stands before the activation of the depthwise convolution, not after it,
        where the block expands.
      start: how layers start: "timm", "torchvision", "seed" or "torch" (its defaults).
    """

    padding: str = "symmetric"
    epsilon: float = 1e-5
    momentum: float = 0.9
    gate: str = "sigmoid"
    squeeze_activation: str = ""
    squeeze_first: bool = False
    start: str = "timm"


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of an architecture table.

    Attributes:
      kernel: side of the depthwise convolution.
      stride: of it.
      expanded: its channels; those of the input for no expansion.
      channels: that leave the block.
      squeeze: width inside the squeeze-and-excitation; 0: there is none.
      activation: a key of `ACTIVATIONS`.
    """

    kernel: int
    stride: int
    expanded: int
    channels: int
    squeeze: int
    activation: str


class InvertedResidual(nn.Module):
    """Expand (1x1) - depthwise - squeeze-and-excitation - project (1x1), beside the identity.

    MobileNetV2 (arXiv:1801.04381) fig. 4 and MobileNetV3 (arXiv:1905.02244) fig. 4.

    Attributes:
      block: its shape.
      style: of the code base.
      nominal: side of the input that "static" padding assumes, in px.
      norm_group: see `BatchNorm.group`.
      drop: probability that the branch of an image is left out while training.
      dtype: of the computation.
      columns: that come in side by side in the channels, see `packing.packed`; 1 / stride of them
        leave.
      convolve: computes convolutions in place of XLA's own.
    """

    block: Block
    style: Style
    nominal: int = 0
    norm_group: int = 0
    drop: float = 0.0
    dtype: jnp.dtype = jnp.float32
    columns: int = 1
    convolve: Callable[..., Array] | None = None

    @nn.compact
    def __call__(self, images: Array, *, norm: str) -> Array:
        """float[B, H, W, C] -> float[B, ceil(H / stride), ceil(W / stride), channels]."""
        left = max(self.columns // self.block.stride, 1)
        block, style, x = self.block, self.style, images
        act = ACTIVATIONS[block.activation]
        channels = images.shape[-1] // self.columns
        if block.expanded != channels:
            x = self._conv(block.expanded, 1, 1, "expand_conv", self.columns)(x)
            x = act(self._batch_norm("expand_bn", self.columns)(x, norm=norm))
        x = self._conv(
            block.expanded, block.kernel, block.stride, "depthwise_conv", self.columns, True
        )(x)
        x = self._batch_norm("depthwise_bn", left)(x, norm=norm)
        squeeze = functools.partial(self._squeeze, columns=left)
        squeeze_first = style.squeeze_first and block.expanded != channels
        steps: tuple[Activation, ...] = (squeeze, act) if squeeze_first else (act, squeeze)
        for step in steps:
            x = step(x)
        x = self._conv(block.channels, 1, 1, "project_conv", left)(x)
        x = self._batch_norm("project_bn", left)(x, norm=norm)
        if block.stride == 1 and channels == block.channels:
            x = images + drop_path(self, x, self.drop)
        return x

    def _squeeze(self, x: Array, columns: int) -> Array:
        if not self.block.squeeze:
            return x
        return SqueezeExcite(
            self.block.squeeze,
            ACTIVATIONS[self.style.squeeze_activation or self.block.activation],
            GATES[self.style.gate],
            self.style.start,
            self.dtype,
            columns,
            name="squeeze",
        )(x)

    def _conv(self, features, kernel, stride, name, columns, depthwise=False) -> nn.Module:
        return conv(
            self.style, features, kernel, stride, self.nominal, depthwise, self.dtype, name=name,
            convolve=self.convolve, columns=columns,
        )  # fmt: skip

    def _batch_norm(self, name: str, columns: int) -> BatchNorm:
        return batch_norm(self.style, self.norm_group, self.dtype, name=name, columns=columns)


class SqueezeExcite(nn.Module):
    """Channels scaled by what two linear layers make of their means (arXiv:1709.01507).

    Attributes:
      width: between the two layers.
      activation: between them.
      gate: after them.
      start: see `Style.start`.
      dtype: of the computation.
      columns: of a channel, see `packing.packed`.
    """

    width: int
    activation: Activation
    gate: Activation
    start: str
    dtype: jnp.dtype
    columns: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """float[B, H, W, C] -> the same shape."""
        means = pooled(jnp.mean(x.astype(jnp.float32), axis=(1, 2)), self.columns)
        means = means.astype(self.dtype)
        inner = self.activation(self._linear(self.width, means.shape[-1], "reduce")(means))
        gate = self.gate(self._linear(means.shape[-1], self.width, "expand")(inner))
        return x * tiled(gate, self.columns)[:, None, None, :]

    def _linear(self, width: int, fan_in: int, name: str) -> nn.Dense:
        kernel, bias = {
            "timm": (he_fan_out, zeros),  # 1x1 convolutions there
            "torchvision": (he_fan_out, zeros),
            "seed": (narrower, zeros),
            "torch": (torch_kernel, torch_bias(fan_in)),
        }[self.start]
        return nn.Dense(width, kernel_init=kernel, bias_init=bias, dtype=self.dtype, name=name)


def conv(
    style: Style,
    features: int,
    kernel: int,
    stride: int,
    nominal: int,
    depthwise: bool,
    dtype: jnp.dtype,
    *,
    name: str,
    bias: bool = False,
    convolve: Callable[..., Array] | None = None,
    columns: int = 1,
) -> nn.Module:
    """A convolution padded and initialised as the code base does it.

    Args:
      style: of the code base.
      features: channels that leave it.
      kernel: its side.
      stride: of it.
      nominal: side of the input that "static" padding assumes.
      depthwise: one filter a channel.
      dtype: of the computation.
      name: of the module.
      bias: whether it has one.
      convolve: computes it in place of XLA's own convolution.
      columns: that come in side by side in the channels; 1 / stride of them leave, see
        `columns.ColumnConv`.
    """
    padding = _padding(style.padding, kernel, stride, nominal)
    draw = _conv_init(style.start, depthwise)
    if columns > 1:
        left = columns // stride
        return ColumnConv(
            features, kernel, stride, left, padding, depthwise, draw, dtype, name=name
        )
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding=padding,
        feature_group_count=features if depthwise else 1,
        use_bias=bias,
        kernel_init=draw,
        bias_init=zeros,
        dtype=dtype,
        conv_general_dilated=convolve,
        name=name,
    )


def batch_norm(
    style: Style, group: int, dtype: jnp.dtype, *, name: str, columns: int = 1
) -> BatchNorm:
    """The code base's BatchNorm; `group` and `columns` as in `BatchNorm`."""
    return BatchNorm(group, style.epsilon, style.momentum, dtype=dtype, columns=columns, name=name)


def divisible(channels: float, by: int = 8) -> int:
    """`channels` rounded to a multiple of `by`, never down by more than a tenth."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded


def shrink(nominal: int, stride: int) -> int:
    """The side that TensorFlow's padding leaves of `nominal` px after a stride."""
    return -(-nominal // stride)


def _padding(padding: str, kernel: int, stride: int, nominal: int):
    if padding == "same":
        return "SAME"
    if padding == "symmetric":
        return (kernel - 1) // 2
    total = max((shrink(nominal, stride) - 1) * stride + kernel - nominal, 0)
    return ((total // 2, total - total // 2),) * 2


def _conv_init(start: str, depthwise: bool):
    if start == "torch":
        return torch_kernel
    return he_fan_out_depthwise if depthwise and start == "timm" else he_fan_out
