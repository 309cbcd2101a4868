"""Layers that vision transformers share: linear layers, LayerNorm, the MLP, attention heads."""

import functools

import flax.linen as nn
from jax import Array

from disco_jax.models.layers.compute import Compute
from disco_jax.models.layers.initializers import narrow, ones, zeros

gelu = functools.partial(nn.gelu, approximate=False)


def linear(compute: Compute, width: int, *, name: str) -> nn.Dense:
    """Returns a linear layer whose kernel starts with standard deviation 0.02."""
    return nn.Dense(width, kernel_init=narrow, bias_init=zeros, dtype=compute.dtype, name=name)


def layer_norm(compute: Compute, *, name: str) -> nn.LayerNorm:
    """Returns LayerNorm (arXiv:1607.06450) with epsilon 1e-6 and statistics in float32."""
    return nn.LayerNorm(
        epsilon=1e-6,
        dtype=compute.dtype,
        use_fast_variance=False,
        scale_init=ones,
        bias_init=zeros,
        name=name,
    )


class Mlp(nn.Module):
    """Linear, GELU, linear, with four times the width in between.

    Attributes:
      compute: how layers are computed.
    """

    compute: Compute

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps float[..., D] to float[..., D]."""
        hidden = gelu(linear(self.compute, 4 * x.shape[-1], name="fc1")(x))
        return linear(self.compute, x.shape[-1], name="fc2")(hidden)


def split_heads(x: Array, heads: int) -> tuple[Array, Array, Array]:
    """Splits float[B, N, 3 D] into queries, keys and values of float[B, N, heads, D / heads]."""
    batch, tokens, width = x.shape
    x = x.reshape(batch, tokens, 3, heads, width // (3 * heads))
    return x[:, :, 0], x[:, :, 1], x[:, :, 2]
