"""What vision transformers share: layers as they start, the two-layer MLP, LayerNorm."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from disco_jax.models.layers.initializers import narrow, ones, zeros

gelu = functools.partial(nn.gelu, approximate=False)


def linear(width: int, dtype: jnp.dtype, *, name: str) -> nn.Dense:
    """A linear layer whose kernel starts with deviation 0.02."""
    return nn.Dense(width, kernel_init=narrow, bias_init=zeros, dtype=dtype, name=name)


def layer_norm(dtype: jnp.dtype, *, name: str) -> nn.LayerNorm:
    """LayerNorm (arXiv:1607.06450) with epsilon 1e-6, its statistics in float32."""
    return nn.LayerNorm(
        epsilon=1e-6,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=ones,
        bias_init=zeros,
        name=name,
    )


class Mlp(nn.Module):
    """Linear - GELU - linear, four times as wide inside.

    Attributes:
      dtype: of the computation.
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """float[..., D] -> float[..., D]."""
        inner = gelu(linear(4 * x.shape[-1], self.dtype, name="fc1")(x))
        return linear(x.shape[-1], self.dtype, name="fc2")(inner)


def split_heads(x: Array, heads: int) -> tuple[Array, Array, Array]:
    """float[B, N, 3 D] -> queries, keys, values, each float[B, N, heads, D / heads]."""
    batch, tokens, width = x.shape
    x = x.reshape(batch, tokens, 3, heads, width // (3 * heads))
    return x[:, :, 0], x[:, :, 1], x[:, :, 2]
