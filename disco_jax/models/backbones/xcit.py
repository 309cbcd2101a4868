"""XCiT (arXiv:2106.09681): attention between channels instead of tokens, as its code runs it."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from disco_jax.models.layers.attention import Mlp, gelu, layer_norm, linear, split_heads
from disco_jax.models.layers.dropout import drop_path
from disco_jax.models.layers.initializers import constant, narrow, ones, torch_bias, torch_kernel
from disco_jax.models.layers.norm import BatchNorm
from disco_jax.models.layers.shifts import by_shifts

# Of the Fourier code: frequencies an axis and its longest wavelength.
_FREQUENCIES, _TEMPERATURE = 32, 10_000.0


class XCiT(nn.Module):
    """Channel attention, then class attention; features are the class token.

    Attributes:
      width: of a token.
      heads: of each attention.
      depth: blocks of channel attention.
      patch: 16 or 8 px, by 4 or 3 convolutions of stride 2.
      layer_scale: initial scale of every branch; 1e-5 where there are 24 blocks.
      tokens_norm: the class-attention blocks normalise all tokens, not the class token alone.
      class_blocks: blocks of class attention.
      drop_path: stochastic depth, the same in every block of channel attention.
      norm_group: see `BatchNorm.group`.
      shifts: depthwise convolutions are made as CPUs are quick at them, see `shifts.by_shifts`.
      dtype: of the computation; parameters stay float32.
    """

    width: int
    heads: int
    depth: int = 12
    patch: int = 16
    layer_scale: float = 1.0
    tokens_norm: bool = True
    class_blocks: int = 2
    drop_path: float = 0.0
    norm_group: int = 0
    shifts: bool = False
    dtype: jnp.dtype = jnp.float32

    @property
    def out_features(self) -> int:
        """D of its features."""
        return self.width

    @nn.compact
    def __call__(self, images: Array, *, norm: str) -> Array:
        """float[B, H, W, 3], sides of at least `patch` px -> features f32[B, width]."""
        x = images.astype(self.dtype)
        steps = int(np.log2(self.patch))
        for i in range(steps):
            x = nn.Conv(
                self.width // 2 ** (steps - 1 - i),
                (3, 3),
                (2, 2),
                padding=1,
                use_bias=False,
                kernel_init=torch_kernel,
                dtype=self.dtype,
                name=f"patch_conv{i}",
            )(x)
            x = BatchNorm(self.norm_group, dtype=self.dtype, name=f"patch_bn{i}")(x, norm=norm)
            x = gelu(x) if i + 1 < steps else x
        rows, columns = x.shape[1:3]
        code = _linear_conv(self.width, self.dtype, "position")(_fourier(rows, columns))
        x = x.reshape(x.shape[0], rows * columns, -1) + code.reshape(1, rows * columns, -1)
        for i in range(self.depth):
            x = ChannelBlock(
                self.heads,
                self.layer_scale,
                self.drop_path,
                self.norm_group,
                self.dtype,
                self.shifts,
                name=f"block{i}",
            )(x, rows, norm=norm)
        first = self.param("cls_token", narrow, (1, 1, self.width), jnp.float32)
        first = jnp.broadcast_to(first.astype(self.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([first, x], axis=1)
        for i in range(self.class_blocks):
            x = ClassBlock(
                self.heads, self.layer_scale, self.tokens_norm, self.dtype, name=f"cls_block{i}"
            )(x)
        return layer_norm(self.dtype, name="norm")(x)[:, 0].astype(jnp.float32)


class ChannelBlock(nn.Module):
    """Cross-covariance attention, local patch interaction and MLP, each beside the identity.

    Attributes:
      heads: groups of channels that attend to each other.
      layer_scale: initial scale of the branches.
      drop: probability that a branch of an image is left out while training.
      norm_group: see `BatchNorm.group`.
      dtype: of the computation.
      shifts: see `XCiT.shifts`.
    """

    heads: int
    layer_scale: float
    drop: float
    norm_group: int
    dtype: jnp.dtype
    shifts: bool = False

    @nn.compact
    def __call__(self, x: Array, rows: int, *, norm: str) -> Array:
        """float[B, N, D] of `rows` rows of patches -> float[B, N, D]."""
        gamma = [_gamma(self, f"gamma{i}", self.layer_scale, x) for i in (1, 2, 3)]
        y = self._attend(layer_norm(self.dtype, name="norm1")(x))
        x = x + drop_path(self, gamma[0] * y, self.drop)
        y = self._interact(layer_norm(self.dtype, name="norm3")(x), rows, norm)
        x = x + drop_path(self, gamma[2] * y, self.drop)
        y = Mlp(self.dtype, name="mlp")(layer_norm(self.dtype, name="norm2")(x))
        return x + drop_path(self, gamma[1] * y, self.drop)

    def _attend(self, x: Array) -> Array:
        """Equation 5: softmax(K^T Q / tau) over channels, queries and keys unit along tokens."""
        query, key, value = split_heads(
            linear(3 * x.shape[-1], self.dtype, name="qkv")(x), self.heads
        )
        scale = self.param("temperature", ones, (self.heads, 1, 1), jnp.float32)
        query, key = _unit_tokens(query), _unit_tokens(key)
        scores = jnp.einsum("bnhi,bnhj->bhij", query, key).astype(jnp.float32)
        weights = nn.softmax(scores * scale[None], axis=-1).astype(self.dtype)
        y = jnp.einsum("bhij,bnhj->bnhi", weights, value).reshape(x.shape)
        return linear(x.shape[-1], self.dtype, name="proj")(y)

    def _interact(self, x: Array, rows: int, norm: str) -> Array:
        """Two depthwise 3x3 convolutions on the grid of patches."""
        width = x.shape[-1]
        y = x.reshape(x.shape[0], rows, -1, width)
        y = gelu(self._depthwise(width, "local_conv1")(y))
        y = BatchNorm(self.norm_group, dtype=self.dtype, name="local_bn")(y, norm=norm)
        return self._depthwise(width, "local_conv2")(y).reshape(x.shape)

    def _depthwise(self, width: int, name: str) -> nn.Conv:
        return nn.Conv(
            width,
            (3, 3),
            padding=1,
            feature_group_count=width,
            kernel_init=torch_kernel,
            bias_init=torch_bias(9),
            dtype=self.dtype,
            conv_general_dilated=by_shifts if self.shifts else None,
            name=name,
        )


class ClassBlock(nn.Module):
    """The class token attends to all tokens (CaiT, arXiv:2103.17239), in XCiT's reading.

    The code normalises before the MLP what it then adds the MLP to, so the residual path carries
    the normalised token, and with `tokens_norm` the patch tokens come out doubled. Weights were
    trained that way.

    Attributes:
      heads: of the attention.
      layer_scale: initial scale of the branches.
      tokens_norm: normalise all tokens, not the class token alone.
      dtype: of the computation.
    """

    heads: int
    layer_scale: float
    tokens_norm: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """float[B, 1 + N, D] -> float[B, 1 + N, D]."""
        gamma = [_gamma(self, f"gamma{i}", self.layer_scale, x) for i in (1, 2)]
        x = x + gamma[0] * self._attend(layer_norm(self.dtype, name="norm1")(x))
        normalise = layer_norm(self.dtype, name="norm2")
        if self.tokens_norm:
            x = normalise(x)
        else:
            x = jnp.concatenate([normalise(x[:, :1]), x[:, 1:]], axis=1)
        first = gamma[1] * Mlp(self.dtype, name="mlp")(x[:, :1])
        return x + jnp.concatenate([first, x[:, 1:]], axis=1)

    def _attend(self, x: Array) -> Array:
        """The class token's attention; the other tokens as they came."""
        batch, _, width = x.shape
        query, key, value = split_heads(linear(3 * width, self.dtype, name="qkv")(x), self.heads)
        scores = jnp.einsum("bhd,bnhd->bhn", query[:, 0], key).astype(jnp.float32)
        scores = scores * (width // self.heads) ** -0.5
        weights = nn.softmax(scores, axis=-1).astype(self.dtype)
        y = jnp.einsum("bhn,bnhd->bhd", weights, value).reshape(batch, 1, width)
        first = linear(width, self.dtype, name="proj")(y)
        return jnp.concatenate([first, x[:, 1:]], axis=1)


def _gamma(module: nn.Module, name: str, scale: float, like: Array) -> Array:
    gamma = module.param(name, constant(scale), (like.shape[-1],), jnp.float32)
    return gamma.astype(like.dtype)[None, None]


def _unit_tokens(x: Array) -> Array:
    """float[B, N, H, D] with unit length along the tokens."""
    length = jnp.linalg.norm(x.astype(jnp.float32), axis=1, keepdims=True)
    return (x / jnp.maximum(length, 1e-12)).astype(x.dtype)


def _linear_conv(width: int, dtype: jnp.dtype, name: str) -> nn.Dense:
    """A 1x1 convolution on constant input, which is a linear layer; starts as torch starts it."""
    return nn.Dense(
        width,
        kernel_init=torch_kernel,
        bias_init=torch_bias(2 * _FREQUENCIES),
        dtype=dtype,
        name=name,
    )


def _fourier(rows: int, columns: int) -> np.ndarray:
    """f32[rows, columns, 64]: sines and cosines of the place, rows first."""
    powers = _TEMPERATURE ** (2 * (np.arange(_FREQUENCIES) // 2) / _FREQUENCIES)

    def code(count: int) -> np.ndarray:
        place = np.arange(1, count + 1) / (count + 1e-6) * 2 * np.pi
        angles = place[:, None] / powers
        waves = np.stack([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=-1)
        return waves.reshape(count, _FREQUENCIES)

    across = np.broadcast_to(code(columns)[None], (rows, columns, _FREQUENCIES))
    down = np.broadcast_to(code(rows)[:, None], (rows, columns, _FREQUENCIES))
    return np.concatenate([down, across], axis=-1).astype(np.float32)


VARIANTS: dict[str, dict[str, Any]] = {
    "xcit_tiny_12_p16": dict(width=192, heads=4),
    "xcit_small_12_p16": dict(width=384, heads=8),
    "xcit_small_12_p8": dict(width=384, heads=8, patch=8),
    "xcit_medium_24_p16": dict(width=512, heads=8, depth=24, layer_scale=1e-5),
    "xcit_medium_24_p8": dict(width=512, heads=8, depth=24, patch=8, layer_scale=1e-5),
}
