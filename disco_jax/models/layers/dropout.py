"""Dropout and stochastic depth, drawn per image of the global batch.

Both act only if the caller passes keys named "dropout", which the train step does for the student.
The key must be equal on all replicas: the mask of an image follows from its position in the global
batch, so that the result does not depend on the number of devices.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.ops.collectives import positions


def dropout(module: nn.Module, x: Array, rate: float) -> Array:
    """Zeroes each number of float[B, ...] with probability `rate`; divides the rest by 1 - rate."""
    return _drop(module, x, rate, x.shape[1:])


def drop_path(module: nn.Module, x: Array, rate: float) -> Array:
    """Zeroes each image of float[B, ...] with probability `rate`; divides the rest by 1 - rate.

    Stochastic depth (arXiv:1603.09382), for the branch of a residual block.
    """
    return _drop(module, x, rate, (1,) * (x.ndim - 1))


def _drop(module: nn.Module, x: Array, rate: float, shape: tuple[int, ...]) -> Array:
    """Applies a mask of `shape` per image."""
    if not rate or not module.has_rng("dropout"):
        return x
    key = module.make_rng("dropout")

    def mask(position: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, position), 1 - rate, shape)

    keep = jax.vmap(mask)(positions(x.shape[0]))
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
