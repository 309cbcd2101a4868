"""Convolutions as backbones describe them, in the layout and by the algorithm of a `Compute`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jax import Array

from disco_jax.models.layers.initializers import Initializer, he_fan_out, zeros
from disco_jax.models.layers.packing import PackedConv, Padding


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution.

    Attributes:
      features: output channels.
      kernel: side of the kernel.
      stride: stride along both axes.
      padding: "symmetric", (kernel - 1) // 2 on all sides; "same", TensorFlow's; or
        ((top, bottom), (left, right)).
      depthwise: whether each channel is convolved with one filter, without mixing channels.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias; None: there is no bias.
    """

    features: int
    kernel: int
    stride: int = 1
    padding: Padding = "symmetric"
    depthwise: bool = False
    kernel_init: Initializer = he_fan_out
    bias_init: Initializer | None = None

    def module(
        self, name: str, dtype: Any, packing: int, algorithm: Callable[..., Array] | None
    ) -> nn.Module:
        """Returns the module that computes it.

        Args:
          name: name of the module.
          dtype: dtype of the computation.
          packing: packed columns of the input; the output packs packing / stride.
          algorithm: replaces `jax.lax.conv_general_dilated` if columns are not packed.
        """
        if packing > 1:
            return PackedConv(
                self.features, self.kernel, self.stride, packing // self.stride, self._pads(),
                self.depthwise, self.kernel_init, dtype, name=name,
            )  # fmt: skip
        return nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            (self.stride, self.stride),
            padding=self._pads(),
            feature_group_count=self.features if self.depthwise else 1,
            use_bias=self.bias_init is not None,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init or zeros,
            dtype=dtype,
            conv_general_dilated=algorithm,
            name=name,
        )

    def _pads(self) -> Padding:
        """Returns the padding as `nn.Conv` takes it."""
        if self.padding == "symmetric":
            return (self.kernel - 1) // 2
        return "SAME" if self.padding == "same" else self.padding
