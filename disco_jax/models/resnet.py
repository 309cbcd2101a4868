"""ResNets (arXiv:1512.03385) in torchvision's layout: stride on the 3x3, biasless convolutions.

With the imagenet stem: a 7x7 convolution of stride 2 and a max-pool of stride 2, for images of
about 224 px. With the small stem: a 3x3 convolution of stride 1 and no pool, for 16 to 64 px.
"""

import functools
from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from disco_jax.models.init import he_fan_out
from disco_jax.models.maps import keep as keep_map
from disco_jax.models.norm import BatchNorm
from disco_jax.models.stem import by_pairs

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
      pairs: the first convolution takes columns by pairs, see `stem.by_pairs`.
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
    dtype: jnp.dtype = jnp.float32

    @property
    def out_features(self) -> int:
        """D of its features."""
        return self.width * 2 ** (len(self.stage_sizes) - 1) * _BLOCKS[self.block].expansion

    @nn.compact
    def __call__(self, images: Array, *, norm: str) -> Array:
        """float[B, H, W, 3] -> features f32[B, D] after the global average pool."""
        conv = functools.partial(_conv, padding=self.padding, dtype=self.dtype)
        batch_norm = functools.partial(BatchNorm, group=self.norm_group, dtype=self.dtype)
        block = functools.partial(
            _BLOCKS[self.block],
            conv=conv,
            batch_norm=batch_norm,
            last_scale=0.0 if self.zero_init_residual else 1.0,
        )
        x = images.astype(self.dtype)
        if self.stem == "imagenet":
            first = by_pairs if self.pairs else None
            x = conv(self.width, 7, 2, name="conv1", convolve=first)(x)
        else:
            x = conv(self.width, 3, name="conv1")(x)
        x = nn.relu(batch_norm(name="bn1")(x, norm=norm))
        if self.stem == "imagenet":
            padding = "SAME" if self.padding == "same" else ((1, 1), (1, 1))
            x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding=padding)
        for stage, size in enumerate(self.stage_sizes):
            for i in range(size):
                x = block(
                    channels=self.width * 2**stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    name=f"layer{stage + 1}_{i}",
                )(x, norm=norm)
            keep_map(self, stage, x)
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the identity."""

    expansion: ClassVar[int] = 1
    channels: int
    stride: int
    conv: Callable[..., nn.Conv]
    batch_norm: type[BatchNorm]
    last_scale: float

    @nn.compact
    def __call__(self, x: Array, *, norm: str) -> Array:
        y = self.conv(self.channels, 3, self.stride, name="conv1")(x)
        y = nn.relu(self.batch_norm(name="bn1")(y, norm=norm))
        y = self.conv(self.channels, 3, name="conv2")(y)
        y = self.batch_norm(scale=self.last_scale, name="bn2")(y, norm=norm)
        return nn.relu(y + _shortcut(self, x, self.channels, norm))


class Bottleneck(nn.Module):
    """1x1 down, 3x3 with the stride, 1x1 up to 4 times the channels."""

    expansion: ClassVar[int] = 4
    channels: int
    stride: int
    conv: Callable[..., nn.Conv]
    batch_norm: type[BatchNorm]
    last_scale: float

    @nn.compact
    def __call__(self, x: Array, *, norm: str) -> Array:
        y = self.conv(self.channels, 1, name="conv1")(x)
        y = nn.relu(self.batch_norm(name="bn1")(y, norm=norm))
        y = self.conv(self.channels, 3, self.stride, name="conv2")(y)
        y = nn.relu(self.batch_norm(name="bn2")(y, norm=norm))
        y = self.conv(4 * self.channels, 1, name="conv3")(y)
        y = self.batch_norm(scale=self.last_scale, name="bn3")(y, norm=norm)
        return nn.relu(y + _shortcut(self, x, 4 * self.channels, norm))


_BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


def _conv(
    features: int, kernel: int, stride: int = 1, *, padding: str, dtype, name: str, convolve=None
) -> nn.Conv:
    """A biasless convolution; `convolve` computes it in place of XLA's own."""
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding="SAME" if padding == "same" else (kernel - 1) // 2,
        use_bias=False,
        kernel_init=he_fan_out,
        dtype=dtype,
        conv_general_dilated=convolve,
        name=name,
    )


def _shortcut(block: BasicBlock | Bottleneck, x: Array, channels: int, norm: str) -> Array:
    """The identity, or a strided 1x1 convolution where the shape changes."""
    if block.stride == 1 and x.shape[-1] == channels:
        return x
    x = block.conv(channels, 1, block.stride, name="downsample_conv")(x)
    return block.batch_norm(name="downsample_bn")(x, norm=norm)


_IMAGENET = dict(width=64, stem="imagenet")
_CIFAR = dict(block="basic", width=16, stem="small")  # the paper's section 4.2: 6n + 2 layers

_50 = dict(stage_sizes=(3, 4, 6, 3), block="bottleneck", stem="imagenet")

VARIANTS = {
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
