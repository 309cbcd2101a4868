"""Heads on top of the pooled features; thrown away when the backbone is deployed."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from disco_jax.models.init import torch_linear


class ProjectionHead(nn.Module):
    """Linear - ReLU - Linear, the MoCo-v2 head (arXiv:2003.04297); its width is DisCo's lever.

    Attributes:
      hidden: width of the hidden layer; 0 leaves a single Linear, -1 takes the features' width
        (DisCo*, SEED).
      dim: of the embedding.
      dtype: of the computation; the embedding is float32.
    """

    hidden: int = 2048
    dim: int = 128
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """float[B, F] -> f32[B, dim], not normalised."""
        x = features
        if self.hidden:
            width = features.shape[-1] if self.hidden < 0 else self.hidden
            x = nn.relu(self._linear(x, width, "hidden"))
        return self._linear(x, self.dim, "out").astype(jnp.float32)

    def _linear(self, x: Array, width: int, name: str) -> Array:
        draw = torch_linear(x.shape[-1])
        return nn.Dense(width, kernel_init=draw, bias_init=draw, dtype=self.dtype, name=name)(x)
