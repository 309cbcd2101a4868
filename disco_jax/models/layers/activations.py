"""Activation functions by the names that architecture tables use."""

import functools
from collections.abc import Callable

import flax.linen as nn
from jax import Array

Activation = Callable[[Array], Array]
ACTIVATIONS: dict[str, Activation] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "swish": nn.swish,
    "hard_swish": nn.hard_swish,
    "gelu": functools.partial(nn.gelu, approximate=False),
}
