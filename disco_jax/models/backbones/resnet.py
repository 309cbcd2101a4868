"""ResNets (arXiv:1512.03385) in torchvision's layout: stride on the 3x3, biasless convolutions.

The imagenet stem is a 7x7 convolution of stride 2 and a max-pool of stride 2, for images of about
224 px. The small stem is a 3x3 convolution of stride 1 without a pool, for 16 to 64 px.
"""

from typing import Any, ClassVar

import flax.linen as nn
from jax import Array

from disco_jax.models.backbones.backbone import Backbone
from disco_jax.models.layers.compute import Compute
from disco_jax.models.layers.feature_maps import FeatureMap, record_stage


class ResNet(Backbone):
    """Residual network up to the global average pool.

    Attributes:
      stage_sizes: residual blocks per stage; each stage after the first halves the resolution.
      block: "basic" (two 3x3) or "bottleneck" (1x1, 3x3, 1x1 with 4 times the channels).
      width: channels of the first stage, doubled in each further stage.
      stem: "imagenet" or "small".
      padding: "symmetric"; or "same", TensorFlow's, which pads more on the right and at the
        bottom, for weights ported from there.
      zero_init_residual: whether the scale of the last BatchNorm of a branch starts at 0, as in
        timm (disagreement M4).
    """

    stage_sizes: tuple[int, ...]
    block: str
    width: int = 64
    stem: str = "imagenet"
    padding: str = "symmetric"
    zero_init_residual: bool = False

    @property
    def out_features(self) -> int:
        """Number of features."""
        return self.width * 2 ** (len(self.stage_sizes) - 1) * _BLOCKS[self.block].expansion

    @nn.compact
    def __call__(self, images: Array, *, norm: str) -> Array:
        """Maps float[B, H, W, 3] to f32[B, out_features]."""
        kernel, stride, pool = (7, 2, True) if self.stem == "imagenet" else (3, 1, False)
        x = self.compute.stem(
            images, self.width, kernel, stride, norm=norm, names=("conv1", "bn1"), pool=pool,
            padding=self.padding,
        )  # fmt: skip
        for stage, size in enumerate(self.stage_sizes):
            for i in range(size):
                block = _BLOCKS[self.block](
                    self.width * 2**stage,
                    2 if stage > 0 and i == 0 else 1,
                    self.padding,
                    0.0 if self.zero_init_residual else 1.0,
                    self.compute,
                    name=f"layer{stage + 1}_{i}",
                )
                x = block(x, norm=norm)
            record_stage(self, stage, x)
        return x.global_average()


class Block(nn.Module):
    """A residual branch beside the identity.

    Attributes:
      channels: channels of the branch; the output has expansion * channels.
      stride: stride of the first 3x3 convolution.
      padding: padding of convolutions, see `ResNet.padding`.
      last_scale: initial scale of the last BatchNorm.
      compute: how layers are computed.
    """

    expansion: ClassVar[int] = 1
    channels: int
    stride: int
    padding: str
    last_scale: float
    compute: Compute

    def _conv_bn(self, x: FeatureMap, features: int, kernel: int, stride: int = 1, **kwargs):
        return self.compute.conv_bn(x, features, kernel, stride, padding=self.padding, **kwargs)

    def _shortcut(self, x: FeatureMap, norm: str) -> FeatureMap:
        """Returns x, or a strided 1x1 convolution of x if the shape changes."""
        features = self.expansion * self.channels
        if self.stride == 1 and x.channels == features:
            return x
        names = ("downsample_conv", "downsample_bn")
        return self._conv_bn(x, features, 1, self.stride, norm=norm, names=names)


class BasicBlock(Block):
    """Two 3x3 convolutions beside the identity."""

    @nn.compact
    def __call__(self, x: FeatureMap, *, norm: str) -> FeatureMap:
        """Maps float[B, H, W, C] to float[B, H / stride, W / stride, channels]."""
        y = self._conv_bn(x, self.channels, 3, self.stride, norm=norm, names=("conv1", "bn1"))
        y = self._conv_bn(
            y.relu(), self.channels, 3, norm=norm, names=("conv2", "bn2"), scale=self.last_scale
        )
        return (y + self._shortcut(x, norm)).relu()


class Bottleneck(Block):
    """1x1 down, 3x3 with the stride, 1x1 up to 4 times the channels, beside the identity."""

    expansion: ClassVar[int] = 4

    @nn.compact
    def __call__(self, x: FeatureMap, *, norm: str) -> FeatureMap:
        """Maps float[B, H, W, C] to float[B, H / stride, W / stride, 4 * channels]."""
        features = self.expansion * self.channels
        y = self._conv_bn(x, self.channels, 1, norm=norm, names=("conv1", "bn1")).relu()
        y = self._conv_bn(y, self.channels, 3, self.stride, norm=norm, names=("conv2", "bn2"))
        y = self._conv_bn(
            y.relu(), features, 1, norm=norm, names=("conv3", "bn3"), scale=self.last_scale
        )
        return (y + self._shortcut(x, norm)).relu()


_BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
_IMAGENET = dict(width=64, stem="imagenet")
_CIFAR = dict(block="basic", width=16, stem="small")  # the paper's section 4.2: 6n + 2 layers
_50 = dict(stage_sizes=(3, 4, 6, 3), block="bottleneck", stem="imagenet")

FAMILY = ResNet
VARIANTS: dict[str, dict[str, Any]] = {
    "resnet18": dict(stage_sizes=(2, 2, 2, 2), block="basic", **_IMAGENET),
    "resnet34": dict(stage_sizes=(3, 4, 6, 3), block="basic", **_IMAGENET),
    "resnet50": dict(width=64, **_50),
    "resnet101": dict(stage_sizes=(3, 4, 23, 3), block="bottleneck", **_IMAGENET),
    "resnet152": dict(stage_sizes=(3, 8, 36, 3), block="bottleneck", **_IMAGENET),
    "resnet50w2": dict(width=128, **_50),  # SwAV's, with twice the channels
    "resnet50w4": dict(width=256, **_50),
    "resnet50w5": dict(width=320, **_50),
    "resnet50_same": dict(width=64, padding="same", **_50),  # BYOL's weights, ported
    "resnet8": dict(stage_sizes=(1, 1, 1), **_CIFAR),
    "resnet14": dict(stage_sizes=(2, 2, 2), **_CIFAR),
    "resnet20": dict(stage_sizes=(3, 3, 3), **_CIFAR),
}
