"""ConvNeXts (arXiv:2201.03545) in timm's small sizes, for images of about 224 px."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from disco_jax.errors import UserError
from disco_jax.models.backbones.backbone import Backbone
from disco_jax.models.layers.compute import Compute
from disco_jax.models.layers.dropout import drop_path
from disco_jax.models.layers.feature_maps import FeatureMap, record_stage
from disco_jax.models.layers.initializers import constant, narrow, zeros
from disco_jax.models.layers.self_attention import Mlp, layer_norm

_MIN_SIZE = 32  # the strides of stem and downsampling multiply to 32
_NO_PADDING = ((0, 0), (0, 0))


class ConvNeXt(Backbone):
    """Convolutional network whose features are a LayerNorm of the global average.

    Attributes:
      depths: blocks per stage; each stage after the first halves the resolution.
      width: channels of the first stage, doubled in each further stage.
      drop_path: stochastic depth of the last block; grows linearly from 0 at the first block.
      compute: how layers are computed.
    """

    depths: tuple[int, ...] = (2, 2, 6, 2)
    width: int = 40
    drop_path: float = 0.0
    compute: Compute = Compute()

    @property
    def out_features(self) -> int:
        """Number of features."""
        return self.width * 2 ** (len(self.depths) - 1)

    @nn.compact
    def __call__(self, images: Array, *, norm: str) -> Array:
        """Maps images to features.

        Args:
          images: float[B, H, W, 3], normalized; H and W at least 32.
          norm: has no effect, as there is no BatchNorm.

        Returns:
          f32[B, out_features].

        Raises:
          UserError: the images are too small for the strides.
        """
        del norm
        if min(images.shape[1:3]) < _MIN_SIZE:
            raise UserError(
                f"Images of {images.shape[1]} x {images.shape[2]} px are too small for a ConvNeXt, "
                f"which needs {_MIN_SIZE} px. Set config.augment.size, or choose another backbone."
            )
        x, index = FeatureMap(images.astype(self.compute.dtype)), 0
        for stage, depth in enumerate(self.depths):
            x = self._downsample(x, stage)
            for i in range(depth):
                rate = self.drop_path * index / max(sum(self.depths) - 1, 1)
                x = Block(rate, self.compute, name=f"block{stage}_{i}")(x)
                index += 1
            record_stage(self, stage, x)
        average = x.global_average().astype(self.compute.dtype)
        return layer_norm(self.compute, name="norm")(average).astype(jnp.float32)

    def _downsample(self, x: FeatureMap, stage: int) -> FeatureMap:
        """Applies patches of 4 px and LayerNorm, or later LayerNorm and patches of 2 positions."""
        side, name = (2, f"downsample{stage}") if stage else (4, "stem")
        norm = layer_norm(self.compute, name=f"{name}_norm")
        x = x.map(norm) if stage else x
        x = self.compute.conv(
            x, self.width * 2**stage, side, side, name=f"{name}_conv", padding=_NO_PADDING,
            kernel_init=narrow, bias_init=zeros,
        )  # fmt: skip
        return x if stage else x.map(norm)


class Block(nn.Module):
    """A depthwise 7x7 convolution, LayerNorm and an MLP, scaled per channel, beside the identity.

    Attributes:
      drop: probability that the branch of an image is dropped while training.
      compute: how layers are computed.
    """

    drop: float
    compute: Compute

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Maps float[B, H, W, C] to float[B, H, W, C]."""
        y = self.compute.conv(
            x, x.channels, 7, name="depthwise_conv", depthwise=True, kernel_init=narrow,
            bias_init=zeros,
        )  # fmt: skip
        y = y.map(layer_norm(self.compute, name="norm")).map(Mlp(self.compute, name="mlp"))
        gamma = self.param("gamma", constant(1e-6), (x.channels,), jnp.float32)
        scale = gamma.astype(self.compute.dtype)[None, None, None]
        return x + y.map(lambda y: drop_path(self, scale * y, self.drop))


FAMILY = ConvNeXt
VARIANTS: dict[str, dict[str, Any]] = {
    "convnext_atto": dict(width=40),
    "convnext_femto": dict(width=48),
    "convnext_pico": dict(width=64),
    "convnext_nano": dict(width=80, depths=(2, 2, 8, 2)),
}
