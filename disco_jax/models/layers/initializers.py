"""Initializers that draw on the host with NumPy, so that nothing has to be compiled.

`module.lazy_init` infers shapes without computing the network and calls initializers with a
concrete key. Jitted random draws would compile one small program per shape (23 s for 20 layers on
two cores). Under `jit` or `eval_shape`, where the key is a tracer, `jax.random` draws other numbers
from the same distribution.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Initializer = Callable[..., Array]


def normal(stddev: Callable[[Sequence[int]], float]) -> Initializer:
    """Returns an initializer from a Gaussian of mean 0 and standard deviation `stddev(shape)`."""

    def init(key: Array, shape: Sequence[int], dtype=jnp.float32) -> Array:
        if isinstance(key, jax.core.Tracer):
            return jax.random.normal(key, shape, dtype) * stddev(shape)
        draws = _generator(key).standard_normal(shape, np.float32) * np.float32(stddev(shape))
        return jnp.asarray(draws, dtype)

    return init


def uniform(bound: Callable[[Sequence[int]], float]) -> Initializer:
    """Returns an initializer from the uniform distribution on +-`bound(shape)`."""

    def init(key: Array, shape: Sequence[int], dtype=jnp.float32) -> Array:
        limit = bound(shape)
        if isinstance(key, jax.core.Tracer):
            return jax.random.uniform(key, shape, dtype, -limit, limit)
        draws = (2 * _generator(key).random(shape, np.float32) - 1) * np.float32(limit)
        return jnp.asarray(draws, dtype)

    return init


def constant(value: float) -> Initializer:
    """Returns an initializer that fills arrays with `value`."""
    return lambda key, shape, dtype=jnp.float32: jnp.asarray(np.full(shape, value), dtype)


def _fan_out(shape: Sequence[int]) -> float:
    *window, _, features = shape
    return float(np.prod(window)) * features


# He et al. (arXiv:1502.01852), eq. 10 with the fan-out: torchvision's for convolutions before ReLU.
he_fan_out = normal(lambda shape: np.sqrt(2 / _fan_out(shape)))
# timm's form for depthwise convolutions, in which a filter feeds one channel.
he_fan_out_depthwise = normal(lambda shape: np.sqrt(2 / np.prod(shape[:-2])))
# Transformers: torch's truncated normal of deviation 0.02, whose bounds of 2 are never reached.
narrow = normal(lambda shape: 0.02)
narrower = normal(lambda shape: 0.01)
# torch's default for the kernel of a convolution or a linear layer.
torch_kernel = uniform(lambda shape: 1 / np.sqrt(np.prod(shape[:-1])))
zeros, ones = constant(0.0), constant(1.0)


def unit_columns(key: Array, shape: Sequence[int], dtype=jnp.float32) -> Array:
    """Draws `torch_kernel` and scales columns to length 1, as SwAV scales its prototypes."""
    kernel = torch_kernel(key, shape, jnp.float32)
    if isinstance(key, jax.core.Tracer):
        return (kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True)).astype(dtype)
    columns = np.asarray(kernel)
    return jnp.asarray(columns / np.linalg.norm(columns, axis=0, keepdims=True), dtype)


def torch_bias(fan_in: int) -> Initializer:
    """Returns torch's default initializer of a bias: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    Args:
      fan_in: inputs of one output.
    """
    return uniform(lambda shape: 1 / np.sqrt(fan_in))


def _generator(key: Array) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.asarray(jax.random.key_data(key)).tolist()))
