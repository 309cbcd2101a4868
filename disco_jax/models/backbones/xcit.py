"""XCiT (arXiv:2106.09681): attention between channels instead of tokens, as in its code."""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from disco_jax.models.backbones.backbone import Backbone
from disco_jax.models.layers.compute import Compute
from disco_jax.models.layers.dropout import drop_path
from disco_jax.models.layers.feature_maps import FeatureMap
from disco_jax.models.layers.initializers import constant, narrow, ones, torch_bias, torch_kernel
from disco_jax.models.layers.self_attention import Mlp, gelu, layer_norm, linear, split_heads

# Fourier features of positions: frequencies per axis and the longest wavelength.
_FREQUENCIES, _TEMPERATURE = 32, 10_000.0


class XCiT(Backbone):
    """Channel attention, then class attention; the features are the class token.

    Attributes:
      width: width of a token.
      heads: heads of each attention layer.
      depth: blocks of channel attention.
      patch: side of a patch, 16 or 8 px, reached by 4 or 3 convolutions of stride 2.
      layer_scale: initial scale of every branch; 1e-5 for 24 blocks.
      tokens_norm: whether class-attention blocks normalize all tokens, not the class token alone.
      class_blocks: blocks of class attention.
      drop_path: stochastic depth, the same in every block of channel attention.
    """

    is_transformer: ClassVar[bool] = True
    width: int
    heads: int
    depth: int = 12
    patch: int = 16
    layer_scale: float = 1.0
    tokens_norm: bool = True
    class_blocks: int = 2
    drop_path: float = 0.0

    @property
    def out_features(self) -> int:
        """Number of features."""
        return self.width

    @nn.compact
    def __call__(self, images: Array, *, norm: str) -> Array:
        """Maps float[B, H, W, 3], with sides of at least `patch` px, to f32[B, width]."""
        x, rows = self._patches(images, norm)
        for i in range(self.depth):
            block = ChannelBlock(
                self.heads, self.layer_scale, self.drop_path, self.compute, name=f"block{i}"
            )
            x = block(x, rows, norm=norm)
        token = self.param("cls_token", narrow, (1, 1, self.width), jnp.float32)
        token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([token, x], axis=1)
        for i in range(self.class_blocks):
            x = ClassBlock(
                self.heads, self.layer_scale, self.tokens_norm, self.compute, name=f"cls_block{i}"
            )(x)
        return layer_norm(self.compute, name="norm")(x)[:, 0].astype(jnp.float32)

    def _patches(self, images: Array, norm: str) -> tuple[Array, int]:
        """Embeds patches with their positions.

        Returns:
          float[B, N, width] and the number of rows of patches.
        """
        x = images.astype(self.compute.dtype)
        steps = int(np.log2(self.patch))
        for i in range(steps):
            x = nn.Conv(
                self.width // 2 ** (steps - 1 - i),
                (3, 3),
                (2, 2),
                padding=1,
                use_bias=False,
                kernel_init=torch_kernel,
                dtype=self.compute.dtype,
                name=f"patch_conv{i}",
            )(x)
            x = self.compute.batch_norm(name=f"patch_bn{i}")(x, norm=norm)
            x = gelu(x) if i + 1 < steps else x
        rows, columns = x.shape[1:3]
        code = _position_layer(self.width, self.compute)(_fourier_features(rows, columns))
        x = x.reshape(x.shape[0], rows * columns, -1) + code.reshape(1, rows * columns, -1)
        return x, rows


class ChannelBlock(nn.Module):
    """Cross-covariance attention, local patch interaction and MLP, each beside the identity.

    Attributes:
      heads: groups of channels that attend to each other.
      layer_scale: initial scale of the branches.
      drop: probability that a branch of an image is dropped while training.
      compute: how layers are computed.
    """

    heads: int
    layer_scale: float
    drop: float
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, rows: int, *, norm: str) -> Array:
        """Maps float[B, N, D], N patches in `rows` rows, to float[B, N, D]."""
        gamma = [_gamma(self, f"gamma{i}", self.layer_scale, x) for i in (1, 2, 3)]
        y = self._attention(layer_norm(self.compute, name="norm1")(x))
        x = x + drop_path(self, gamma[0] * y, self.drop)
        y = self._interaction(layer_norm(self.compute, name="norm3")(x), rows, norm)
        x = x + drop_path(self, gamma[2] * y, self.drop)
        y = Mlp(self.compute, name="mlp")(layer_norm(self.compute, name="norm2")(x))
        return x + drop_path(self, gamma[1] * y, self.drop)

    def _attention(self, x: Array) -> Array:
        """Computes eq. 5: softmax(K^T Q / tau) over channels, Q and K normalized along tokens."""
        width = x.shape[-1]
        query, key, value = split_heads(linear(self.compute, 3 * width, name="qkv")(x), self.heads)
        scale = self.param("temperature", ones, (self.heads, 1, 1), jnp.float32)
        query, key = _normalize_tokens(query), _normalize_tokens(key)
        scores = jnp.einsum("bnhi,bnhj->bhij", query, key).astype(jnp.float32)
        weights = nn.softmax(scores * scale[None], axis=-1).astype(self.compute.dtype)
        y = jnp.einsum("bhij,bnhj->bnhi", weights, value).reshape(x.shape)
        return linear(self.compute, width, name="proj")(y)

    def _interaction(self, x: Array, rows: int, norm: str) -> Array:
        """Applies two depthwise 3x3 convolutions to the grid of patches."""
        y = FeatureMap(x.reshape(x.shape[0], rows, -1, x.shape[-1]))
        batch_norm = self.compute.batch_norm(name="local_bn")
        y = self._depthwise(y, "local_conv1").map(gelu)
        y = self._depthwise(y.map(lambda y: batch_norm(y, norm=norm)), "local_conv2")
        return y.x.reshape(x.shape)

    def _depthwise(self, x: FeatureMap, name: str) -> FeatureMap:
        return self.compute.conv(
            x, x.channels, 3, name=name, depthwise=True, kernel_init=torch_kernel,
            bias_init=torch_bias(9),
        )  # fmt: skip


class ClassBlock(nn.Module):
    """Attention of the class token to all tokens (CaiT, arXiv:2103.17239), as XCiT's code has it.

    The code adds the MLP to its normalized input, so the residual path carries the normalized
    token, and with `tokens_norm` the patch tokens are doubled. Weights were trained that way.

    Attributes:
      heads: heads of the attention layer.
      layer_scale: initial scale of the branches.
      tokens_norm: whether to normalize all tokens, not the class token alone.
      compute: how layers are computed.
    """

    heads: int
    layer_scale: float
    tokens_norm: bool
    compute: Compute

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps float[B, 1 + N, D] to float[B, 1 + N, D]."""
        gamma = [_gamma(self, f"gamma{i}", self.layer_scale, x) for i in (1, 2)]
        x = x + gamma[0] * self._attention(layer_norm(self.compute, name="norm1")(x))
        normalize = layer_norm(self.compute, name="norm2")
        if self.tokens_norm:
            x = normalize(x)
        else:
            x = jnp.concatenate([normalize(x[:, :1]), x[:, 1:]], axis=1)
        token = gamma[1] * Mlp(self.compute, name="mlp")(x[:, :1])
        return x + jnp.concatenate([token, x[:, 1:]], axis=1)

    def _attention(self, x: Array) -> Array:
        """Replaces the class token by its attention to all tokens; keeps the other tokens."""
        batch, _, width = x.shape
        query, key, value = split_heads(linear(self.compute, 3 * width, name="qkv")(x), self.heads)
        scores = jnp.einsum("bhd,bnhd->bhn", query[:, 0], key).astype(jnp.float32)
        scores = scores * (width // self.heads) ** -0.5
        weights = nn.softmax(scores, axis=-1).astype(self.compute.dtype)
        y = jnp.einsum("bhn,bnhd->bhd", weights, value).reshape(batch, 1, width)
        token = linear(self.compute, width, name="proj")(y)
        return jnp.concatenate([token, x[:, 1:]], axis=1)


def _gamma(module: nn.Module, name: str, scale: float, like: Array) -> Array:
    """Returns the learned scale of a branch, broadcast to the tokens `like`."""
    gamma = module.param(name, constant(scale), (like.shape[-1],), jnp.float32)
    return gamma.astype(like.dtype)[None, None]


def _normalize_tokens(x: Array) -> Array:
    """Scales float[B, N, H, D] to length 1 along the tokens."""
    length = jnp.linalg.norm(x.astype(jnp.float32), axis=1, keepdims=True)
    return (x / jnp.maximum(length, 1e-12)).astype(x.dtype)


def _position_layer(width: int, compute: Compute) -> nn.Dense:
    """Returns XCiT's 1x1 convolution of Fourier features, which is a linear layer."""
    return nn.Dense(
        width,
        kernel_init=torch_kernel,
        bias_init=torch_bias(2 * _FREQUENCIES),
        dtype=compute.dtype,
        name="position",
    )


def _fourier_features(rows: int, columns: int) -> np.ndarray:
    """Returns f32[rows, columns, 64]: sines and cosines of the position, that of the row first."""
    powers = _TEMPERATURE ** (2 * (np.arange(_FREQUENCIES) // 2) / _FREQUENCIES)

    def encode(count: int) -> np.ndarray:
        position = np.arange(1, count + 1) / (count + 1e-6) * 2 * np.pi
        angles = position[:, None] / powers
        waves = np.stack([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=-1)
        return waves.reshape(count, _FREQUENCIES)

    horizontal = np.broadcast_to(encode(columns)[None], (rows, columns, _FREQUENCIES))
    vertical = np.broadcast_to(encode(rows)[:, None], (rows, columns, _FREQUENCIES))
    return np.concatenate([vertical, horizontal], axis=-1).astype(np.float32)


FAMILY = XCiT
VARIANTS: dict[str, dict[str, Any]] = {
    "xcit_tiny_12_p16": dict(width=192, heads=4),
    "xcit_small_12_p16": dict(width=384, heads=8),
    "xcit_small_12_p8": dict(width=384, heads=8, patch=8),
    "xcit_medium_24_p16": dict(width=512, heads=8, depth=24, layer_scale=1e-5),
    "xcit_medium_24_p8": dict(width=512, heads=8, depth=24, patch=8, layer_scale=1e-5),
}
