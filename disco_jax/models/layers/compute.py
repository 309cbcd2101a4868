"""Computation of layers: one `Compute` per network, made from the config once.

Backbones define channels, strides and names and call the layers of their `Compute`. All choices
give the same parameters and, up to rounding, the same outputs. An optimization belongs here or in
a module that is called from here, not in a backbone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.models.layers.conv import Conv
from disco_jax.models.layers.feature_maps import FeatureMap
from disco_jax.models.layers.initializers import Initializer, he_fan_out
from disco_jax.models.layers.norm import BatchNorm, ConvInput
from disco_jax.models.layers.packing import Padding, pack_width
from disco_jax.models.layers.settings import FastSettings, compute_dtype, resolve_auto
from disco_jax.models.layers.shifts import Pads, max_pool, shift_and_add
from disco_jax.models.layers.space_to_depth import space_to_depth_conv

_LANES = 128  # channels that a TPU computes on at a time
_MAX_PACKING = 4  # eight columns save nothing more in MobileNetV3 (benchmarks/README.md)
# A packed depthwise convolution is dense. Beyond this width that costs more than empty lanes.
_MAX_PACKED_DEPTHWISE = 144


@dataclasses.dataclass(frozen=True)
class Compute:
    """Settings by which the layers of a network are computed, and the layers themselves.

    Attributes:
      dtype: dtype of activations; parameters stay float32.
      norm_group: images per BatchNorm group, see `BatchNorm.group`. This field and the next are the
        only ones that change what is computed.
      sync_groups: see `BatchNorm.sync_groups`.
      exchange: how images are shuffled across replicas, see `collectives.shuffle`.
      fast_stem: whether the first convolution reads pairs of columns, see `space_to_depth`, and a
        max-pool after it precedes the normalization, see `BatchNorm`.
      width_packing: whether early layers pack adjacent columns into channels, see `packing`.
      stats_from_input: whether BatchNorm after a widening 1x1 convolution inside a block computes
        its statistics from the convolution's input, see `BatchNorm`.
      shift_and_add: whether convolutions after the first one and max-pools use shifted maps, see
        `shifts`.
      fold_frozen: whether networks that never change have BatchNorm folded into the layers before
        it and kernels stored in `dtype`, see `folding`.
    """

    dtype: Any = jnp.float32
    norm_group: int = 0
    sync_groups: int = 1
    exchange: str = "gather"
    fast_stem: bool = True
    width_packing: bool = False
    stats_from_input: bool = False
    shift_and_add: bool = False
    fold_frozen: bool = True

    @classmethod
    def from_settings(cls, fast: FastSettings, dtype: str, network: str) -> "Compute":
        """Returns how a pretraining run computes a network.

        Args:
          fast: `config.fast`.
          dtype: `config.dtype`.
          network: "student", "momentum" or "teacher". The student does not compute statistics from
            inputs: its gradient reads the wide map anyway, so nothing would be saved.

        Raises:
          UserError: a field has a value that is not allowed.
        """
        return cls(
            dtype=compute_dtype(dtype),
            exchange=resolve_auto("fast.exchange", fast.exchange),
            fast_stem=fast.stem,
            width_packing=resolve_auto("fast.columns", fast.columns) == "on",
            stats_from_input=resolve_auto("fast.statistics", fast.statistics) == "on"
            and network != "student",
            shift_and_add=resolve_auto("fast.shifts", fast.shifts) == "on",
            fold_frozen=fast.teacher,
        )

    def for_inference(self, fast: FastSettings) -> "Compute":
        """Returns `self` with the `shift_and_add` of `config.fast`, for evaluations."""
        shifts = resolve_auto("fast.shifts", fast.shifts)
        return dataclasses.replace(self, shift_and_add=shifts == "on")

    def plain(self) -> "Compute":
        """Returns `self` with every layer computed by XLA's default operations."""
        return Compute(
            self.dtype, self.norm_group, self.sync_groups, fast_stem=False, fold_frozen=False
        )

    def conv(
        self,
        x: FeatureMap,
        features: int,
        kernel: int,
        stride: int = 1,
        *,
        name: str,
        padding: Padding = "symmetric",
        depthwise: bool = False,
        kernel_init: Initializer = he_fan_out,
        bias_init: Initializer | None = None,
    ) -> FeatureMap:
        """Convolves a feature map.

        Args:
          x: float[B, H, W, C].
          features, kernel, stride, padding, depthwise, kernel_init, bias_init: see `Conv`.
          name: name of the module.

        Returns:
          float[B, H / stride, W / stride, features].
        """
        conv = Conv(features, kernel, stride, padding, depthwise, kernel_init, bias_init)
        module, x = self._conv(conv, x, name)
        return FeatureMap(module(x.x), max(x.width_packing // stride, 1))

    def conv_bn(
        self,
        x: FeatureMap,
        features: int,
        kernel: int,
        stride: int = 1,
        *,
        norm: str,
        names: tuple[str, str],
        padding: Padding = "symmetric",
        depthwise: bool = False,
        kernel_init: Initializer = he_fan_out,
        scale: float = 1.0,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
    ) -> FeatureMap:
        """Convolves a feature map without bias and normalizes the output.

        Args:
          x: float[B, H, W, C].
          features, kernel, stride, padding, depthwise, kernel_init: see `Conv`.
          norm: mode of BatchNorm.
          names: names of the two modules.
          scale, epsilon, momentum: see `BatchNorm`.

        Returns:
          float[B, H / stride, W / stride, features].
        """
        conv = Conv(features, kernel, stride, padding, depthwise, kernel_init)
        module, x = self._conv(conv, x, names[0])
        parent = module.path[:-1]
        packing = max(x.width_packing // stride, 1)
        y, conv_input = module(x.x), None
        # Not for the input of a block: the blocks of EfficientNet-B0 widen theirs, and computing
        # its covariance takes longer (benchmarks/README.md).
        if self.stats_from_input and (kernel, stride) == (1, 1) and x.parent == parent:
            conv_input = ConvInput.of(module, x.x)
        batch_norm = self.batch_norm(
            name=names[1], width_packing=packing, scale=scale, epsilon=epsilon, momentum=momentum
        )
        return FeatureMap(batch_norm(y, norm=norm, conv_input=conv_input), packing, parent)

    def stem(
        self,
        images: Array,
        features: int,
        kernel: int,
        stride: int,
        *,
        norm: str,
        names: tuple[str, str],
        activation: Callable[[Array], Array] = nn.relu,
        pool: bool = False,
        padding: Padding = "symmetric",
        kernel_init: Initializer = he_fan_out,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
    ) -> FeatureMap:
        """Computes the first layers: convolution, BatchNorm, activation, optionally a max-pool.

        Args:
          images: float[B, H, W, 3], normalized.
          features, kernel, stride, padding, kernel_init: see `Conv`.
          norm, names, epsilon, momentum: see `conv_bn`.
          activation: activation after BatchNorm; must be increasing if there is a pool.
          pool: whether a 3x3 max-pool of stride 2 ends the stem.
        """
        images = images.astype(self.dtype)
        packing = 1 if pool else self._stem_packing(features, images.shape[2], stride)
        packing_in = packing * stride if packing > 1 else 1
        conv = Conv(features, kernel, stride, padding, kernel_init=kernel_init)
        algorithm = space_to_depth_conv if self.fast_stem else None
        module = conv.module(names[0], self.dtype, packing_in, algorithm)
        x = module(pack_width(images, packing_in))
        batch_norm = self.batch_norm(
            name=names[1], width_packing=packing, epsilon=epsilon, momentum=momentum
        )
        if not pool:
            return FeatureMap(activation(batch_norm(x, norm=norm)), packing)
        packing = self._stem_packing(features, -(-x.shape[2] // 2), 1)
        pads = _pool_padding(padding, x.shape[1:3])

        def pool_and_pack(x: Array) -> Array:
            pool = max_pool if self.shift_and_add else _max_pool
            return pack_width(pool(x, pads), packing)

        if self.fast_stem:
            return FeatureMap(activation(batch_norm(x, norm=norm, pool=pool_and_pack)), packing)
        return FeatureMap(pool_and_pack(activation(batch_norm(x, norm=norm))), packing)

    def batch_norm(
        self,
        *,
        name: str,
        width_packing: int = 1,
        scale: float = 1.0,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
    ) -> BatchNorm:
        """Returns a `BatchNorm`; see there for the arguments."""
        return BatchNorm(
            self.norm_group,
            epsilon,
            momentum,
            scale,
            self.dtype,
            width_packing,
            self.sync_groups,
            name=name,
        )

    def _stem_packing(self, features: int, width: int, stride: int) -> int:
        """Returns how many columns a stem packs: a power of 2, or 1 if they do not fit.

        Args:
          features: channels of the output.
          width: columns of the input.
          stride: horizontal stride from the input to the output.
        """
        lanes = max(_LANES // features, 1)
        packing = min(1 << (lanes.bit_length() - 1), _MAX_PACKING) if self.width_packing else 1
        return 1 if width % (stride * packing) else packing

    def _conv(self, conv: Conv, x: FeatureMap, name: str) -> tuple[nn.Module, FeatureMap]:
        """Returns the module of a convolution, and x in the layout that it takes."""
        too_wide = conv.depthwise and conv.features > _MAX_PACKED_DEPTHWISE
        if x.width_packing > 1 and (too_wide or conv.bias_init):
            x = dataclasses.replace(x, x=x.unpacked(), width_packing=1)
        algorithm = shift_and_add if self.shift_and_add else None
        return conv.module(name, self.dtype, x.width_packing, algorithm), x


def _pool_padding(padding: Padding, size: tuple[int, int]) -> Pads:
    """Returns the padding of a 3x3 max-pool of stride 2; see `Conv.padding`."""
    if padding == "same":
        return jax.lax.padtype_to_pads(size, (3, 3), (2, 2), "SAME")
    return ((1, 1), (1, 1))


def _max_pool(x: Array, padding: Pads) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2), padding)
