"""Operations on the rows of a matrix of embeddings."""

import jax
import jax.numpy as jnp
from jax import Array


def l2_normalize(rows: Array) -> Array:
    """Scales rows to Euclidean length 1, in float32; a zero row stays zero.

    Computes x / max(|x|, 1e-12) as PyTorch's `normalize` does. The gradient is finite everywhere.

    Args:
      rows: float[..., D].

    Returns:
      f32[..., D].
    """
    rows = rows.astype(jnp.float32)
    square = jnp.sum(jnp.square(rows), axis=-1, keepdims=True)
    return rows * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
