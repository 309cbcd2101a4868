"""ResNets (arXiv:1512.03385) in torchvision's layout: stride on the 3x3, biasless convolutions.

With the imagenet stem: a 7x7 convolution of stride 2 and a max-pool of stride 2, for images of
about 224 px. With the small stem: a 3x3 convolution of stride 1 and no pool, for 16 to 64 px.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.models.layers.feature_maps import keep as keep_map
from disco_jax.models.layers.initializers import he_fan_out
from disco_jax.models.layers.norm import BatchNorm, Product
from disco_jax.models.layers.packing import ColumnConv, packed, unpacked
from disco_jax.models.layers.shifts import Pads, by_shifts, max_pool
from disco_jax.models.layers.space_to_depth import by_pairs

STEMS = ("imagenet", "small")


class ResNet(nn.Module):
    """Residual network up to the global average pool.

    Attributes:
      stage_sizes: residual blocks a stage; each stage after the first halves the resolution.
      block: "basic" (two 3x3) or "bottleneck" (1x1, 3x3, 1x1 with 4 times the channels).
      width: channels of the first stage; doubled in each further one.
      stem: "imagenet" or "small".
      padding: "symmetric"; "same" is TensorFlow's, more on the right and at the bottom, which
        weights ported from there expect.
      zero_init_residual: the last BatchNorm of a branch starts at 0, as in timm (disagreement M4).
      norm_group: see `BatchNorm.group`.
      pairs: the first convolution takes columns by pairs, see `space_to_depth.by_pairs`, and the max-pool
        comes before the normalisation, see `BatchNorm`.
      columns: that lie side by side in the channels of the first stage, whose 64 fill half of a
        TPU's lanes; see `packing.packed`. 1, or maps have another width: none do.
      by_product: see `BatchNorm.by_product`.
      shifts: convolutions behind the first and the max-pool are made as CPUs are quick at them,
        see `shifts.by_shifts`.
      dtype: of the computation; parameters stay float32.
    """

    stage_sizes: tuple[int, ...]
    block: str
    width: int = 64
    stem: str = "imagenet"
    padding: str = "symmetric"
    zero_init_residual: bool = False
    norm_group: int = 0
    pairs: bool = True
    columns: int = 1
    by_product: bool = False
    shifts: bool = False
    dtype: jnp.dtype = jnp.float32

    @property
    def packing(self) -> int:
        """The `columns` that fill a TPU's lanes."""
        return 2 if self.width <= 64 else 1

    @property
    def out_features(self) -> int:
        """D of its features."""
        return self.width * 2 ** (len(self.stage_sizes) - 1) * _BLOCKS[self.block].expansion

    @nn.compact
    def __call__(self, images: Array, *, norm: str) -> Array:
        """float[B, H, W, 3] -> features f32[B, D] after the global average pool."""
        batch_norm = functools.partial(
            BatchNorm, group=self.norm_group, dtype=self.dtype, by_product=self.by_product
        )
        block = functools.partial(
            _BLOCKS[self.block],
            conv=functools.partial(
                _conv,
                padding=self.padding,
                dtype=self.dtype,
                convolve=by_shifts if self.shifts else None,
            ),
            batch_norm=batch_norm,
            last_scale=0.0 if self.zero_init_residual else 1.0,
        )
        x, columns = self._stem(images.astype(self.dtype), batch_norm, norm)
        for stage, size in enumerate(self.stage_sizes):
            for i in range(size):
                stride = 2 if stage > 0 and i == 0 else 1
                x = block(
                    channels=self.width * 2**stage,
                    stride=stride,
                    columns=columns,
                    name=f"layer{stage + 1}_{i}",
                )(x, norm=norm)
                columns = max(columns // stride, 1)
            keep_map(self, stage, unpacked(x, columns))
        return jnp.mean(unpacked(x, columns).astype(jnp.float32), axis=(1, 2))

    def _stem(self, x: Array, batch_norm: Callable[..., BatchNorm], norm: str):
        """What the first stage reads, and how many of its columns lie side by side."""
        conv = functools.partial(_conv, padding=self.padding, dtype=self.dtype, name="conv1")
        first = batch_norm(name="bn1")
        if self.stem == "small":
            x = nn.relu(first(conv(self.width, 3)(x), norm=norm))
            columns = self._fitting(x.shape[2])
            return packed(x, columns), columns
        x = conv(self.width, 7, 2, convolve=by_pairs if self.pairs else None)(x)
        columns = self._fitting(-(-x.shape[2] // 2))
        padding: Pads = ((1, 1), (1, 1))
        if self.padding == "same":
            padding = jax.lax.padtype_to_pads(x.shape[1:3], (3, 3), (2, 2), "SAME")

        def pool(x: Array) -> Array:
            if self.shifts:
                return packed(max_pool(x, padding), columns)
            return packed(nn.max_pool(x, (3, 3), (2, 2), padding), columns)

        if self.pairs:
            return nn.relu(first(x, norm=norm, pool=pool)), columns
        return pool(nn.relu(first(x, norm=norm))), columns

    def _fitting(self, width: int) -> int:
        """`columns`, if maps of this width can be packed so, and halved."""
        return 1 if width % (2 * self.columns) else self.columns


class Block(nn.Module):
    """A residual branch beside the identity.

    Attributes:
      channels: of the branch; `expansion` times as many leave it.
      stride: of its first 3x3 convolution.
      conv: makes a convolution: channels, side, stride, and of what columns.
      batch_norm: makes a BatchNorm.
      last_scale: initial scale of the last BatchNorm.
      columns: that come in side by side; 1 / stride of them leave.
    """

    expansion: ClassVar[int] = 1
    channels: int
    stride: int
    conv: Callable[..., nn.Module]
    batch_norm: Callable[..., BatchNorm]
    last_scale: float
    columns: int = 1

    def _norm(self, name: str, stride: int, **fields) -> BatchNorm:
        """A BatchNorm of maps that `stride` has shrunk."""
        return self.batch_norm(columns=max(self.columns // stride, 1), name=name, **fields)

    def _shortcut(self, x: Array, norm: str) -> Array:
        """The identity, or a strided 1x1 convolution where the shape changes."""
        channels = self.expansion * self.channels
        if self.stride == 1 and x.shape[-1] == channels * self.columns:
            return x
        conv = self.conv(channels, 1, self.stride, columns=self.columns, name="downsample_conv")
        return self._norm("downsample_bn", self.stride)(conv(x), norm=norm)


class BasicBlock(Block):
    """Two 3x3 convolutions beside the identity."""

    @nn.compact
    def __call__(self, x: Array, *, norm: str) -> Array:
        """float[B, H, W, columns * C] -> float[B, H / stride, ..., channels], packed likewise."""
        left = max(self.columns // self.stride, 1)
        y = self.conv(self.channels, 3, self.stride, columns=self.columns, name="conv1")(x)
        y = nn.relu(self._norm("bn1", self.stride)(y, norm=norm))
        y = self.conv(self.channels, 3, columns=left, name="conv2")(y)
        y = self._norm("bn2", self.stride, scale=self.last_scale)(y, norm=norm)
        return nn.relu(y + self._shortcut(x, norm))


class Bottleneck(Block):
    """1x1 down, 3x3 with the stride, 1x1 up to 4 times the channels."""

    expansion: ClassVar[int] = 4

    @nn.compact
    def __call__(self, x: Array, *, norm: str) -> Array:
        """float[B, H, W, columns * C] -> float[B, H / stride, ..., 4 channels], packed likewise."""
        left = max(self.columns // self.stride, 1)
        y = self.conv(self.channels, 1, columns=self.columns, name="conv1")(x)
        y = nn.relu(self._norm("bn1", 1)(y, norm=norm))
        y = self.conv(self.channels, 3, self.stride, columns=self.columns, name="conv2")(y)
        y = nn.relu(self._norm("bn2", self.stride)(y, norm=norm))
        up = self.conv(4 * self.channels, 1, columns=left, name="conv3")
        up, inner = up(y), Product.of(up, y)
        last = self._norm("bn3", self.stride, scale=self.last_scale)
        return nn.relu(last(up, norm=norm, product=inner) + self._shortcut(x, norm))


_BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


def _conv(
    features: int,
    kernel: int,
    stride: int = 1,
    *,
    padding: str,
    dtype,
    name: str,
    convolve=None,
    columns: int = 1,
) -> nn.Module:
    """A biasless convolution; `convolve` computes it in place of XLA's own.

    Where columns come in side by side, 1 / stride of them leave.
    """
    around = "SAME" if padding == "same" else (kernel - 1) // 2
    if columns > 1:
        left = columns // stride
        return ColumnConv(
            features, kernel, stride, left, around, False, he_fan_out, dtype, name=name
        )
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding=around,
        use_bias=False,
        kernel_init=he_fan_out,
        dtype=dtype,
        conv_general_dilated=convolve,
        name=name,
    )


_IMAGENET = dict(width=64, stem="imagenet")
_CIFAR = dict(block="basic", width=16, stem="small")  # the paper's section 4.2: 6n + 2 layers

_50 = dict(stage_sizes=(3, 4, 6, 3), block="bottleneck", stem="imagenet")

VARIANTS: dict[str, dict[str, Any]] = {
    "resnet18": dict(stage_sizes=(2, 2, 2, 2), block="basic", **_IMAGENET),
    "resnet34": dict(stage_sizes=(3, 4, 6, 3), block="basic", **_IMAGENET),
    "resnet50": dict(width=64, **_50),
    "resnet101": dict(stage_sizes=(3, 4, 23, 3), block="bottleneck", **_IMAGENET),
    "resnet152": dict(stage_sizes=(3, 8, 36, 3), block="bottleneck", **_IMAGENET),
    "resnet50w2": dict(width=128, **_50),  # SwAV's: every channel doubled
    "resnet50w4": dict(width=256, **_50),
    "resnet50w5": dict(width=320, **_50),
    "resnet50_same": dict(width=64, padding="same", **_50),  # BYOL's weights, ported
    "resnet8": dict(stage_sizes=(1, 1, 1), **_CIFAR),
    "resnet14": dict(stage_sizes=(2, 2, 2), **_CIFAR),
    "resnet20": dict(stage_sizes=(3, 3, 3), **_CIFAR),
}
