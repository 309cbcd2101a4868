"""Initial values, drawn on the host with NumPy so that nothing has to be compiled.

`module.lazy_init` infers shapes without computing the network and calls these with a concrete
key; jitted random draws would compile one small program a shape (23 s for 20 layers on two
cores). Under `jit` or `eval_shape`, where the key is a tracer, `jax.random` draws from the same
distribution, not the same numbers.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Initializer = Callable[..., Array]


def normal(stddev: Callable[[Sequence[int]], float]) -> Initializer:
    """Gaussian draws of mean 0 with the standard deviation `stddev(shape)`."""

    def init(key: Array, shape: Sequence[int], dtype=jnp.float32) -> Array:
        if isinstance(key, jax.core.Tracer):
            return jax.random.normal(key, shape, dtype) * stddev(shape)
        draws = _generator(key).standard_normal(shape, np.float32) * np.float32(stddev(shape))
        return jnp.asarray(draws, dtype)

    return init


def uniform(bound: float) -> Initializer:
    """Uniform draws between -bound and bound."""

    def init(key: Array, shape: Sequence[int], dtype=jnp.float32) -> Array:
        if isinstance(key, jax.core.Tracer):
            return jax.random.uniform(key, shape, dtype, -bound, bound)
        draws = (2 * _generator(key).random(shape, np.float32) - 1) * np.float32(bound)
        return jnp.asarray(draws, dtype)

    return init


def constant(value: float) -> Initializer:
    """The same value everywhere."""
    return lambda key, shape, dtype=jnp.float32: jnp.asarray(np.full(shape, value), dtype)


def _fan_out(shape: Sequence[int]) -> float:
    *window, _, features = shape
    return float(np.prod(window)) * features


# He et al. (arXiv:1502.01852) eq. 10 with the fan-out: torchvision's convolutions before a ReLU.
he_fan_out = normal(lambda shape: np.sqrt(2 / _fan_out(shape)))


def torch_linear(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): kernel and bias of the papers' projection heads."""
    return uniform(1 / np.sqrt(fan_in))


def _generator(key: Array) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.asarray(jax.random.key_data(key)).tolist()))
