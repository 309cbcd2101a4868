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


def uniform(bound: Callable[[Sequence[int]], float]) -> Initializer:
    """Uniform draws between -`bound(shape)` and `bound(shape)`."""

    def init(key: Array, shape: Sequence[int], dtype=jnp.float32) -> Array:
        limit = bound(shape)
        if isinstance(key, jax.core.Tracer):
            return jax.random.uniform(key, shape, dtype, -limit, limit)
        draws = (2 * _generator(key).random(shape, np.float32) - 1) * np.float32(limit)
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
# Its grouped form, which timm takes: a filter of a depthwise convolution feeds one channel.
he_fan_out_depthwise = normal(lambda shape: np.sqrt(2 / np.prod(shape[:-2])))
# Transformers: torch's truncated normal of deviation 0.02, whose bounds of 2 are never met.
narrow = normal(lambda shape: 0.02)
narrower = normal(lambda shape: 0.01)
# torch's default for the kernel of a convolution or a linear layer.
torch_kernel = uniform(lambda shape: 1 / np.sqrt(np.prod(shape[:-1])))
zeros, ones = constant(0.0), constant(1.0)


def unit_columns(key: Array, shape: Sequence[int], dtype=jnp.float32) -> Array:
    """`torch_kernel` with columns of length 1, as SwAV scales its prototypes before every step."""
    kernel = torch_kernel(key, shape, jnp.float32)
    if isinstance(key, jax.core.Tracer):
        return (kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True)).astype(dtype)
    made = np.asarray(kernel)
    return jnp.asarray(made / np.linalg.norm(made, axis=0, keepdims=True), dtype)


def torch_bias(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch's default for a bias beside `torch_kernel`.

    Args:
      fan_in: inputs of one output.
    """
    return uniform(lambda shape: 1 / np.sqrt(fan_in))


def _generator(key: Array) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.asarray(jax.random.key_data(key)).tolist()))
