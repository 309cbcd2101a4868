"""Dropout and stochastic depth, drawn per image of the global batch.

Both act only where the collection of keys "dropout" is given, which the train step does for the
student. The key must be equal on all replicas: an image's mask follows from its place in the
global batch, so that one device and many draw the same.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.ops.collectives import positions


def dropout(module: nn.Module, x: Array, rate: float) -> Array:
    """Each number of float[B, ...] set to 0 with probability `rate`, the rest / (1 - rate)."""
    return _drop(module, x, rate, x.shape[1:])


def drop_path(module: nn.Module, x: Array, rate: float) -> Array:
    """Each image of float[B, ...] set to 0 with probability `rate`, the rest / (1 - rate).

    Stochastic depth (arXiv:1603.09382), on the branch of a residual block.
    """
    return _drop(module, x, rate, (1,) * (x.ndim - 1))


def _drop(module: nn.Module, x: Array, rate: float, shape: tuple[int, ...]) -> Array:
    if not rate or not module.has_rng("dropout"):
        return x
    key = module.make_rng("dropout")

    def mask(position: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, position), 1 - rate, shape)

    kept = jax.vmap(mask)(positions(x.shape[0]))
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))
