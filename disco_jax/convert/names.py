"""Maps modules and arrays between their PyTorch and their Flax names and layouts.

`disco_jax.convert.backbones` lists the modules of each family; `PARAM_MAPS` lists their arrays.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class ModuleMap(NamedTuple):
    """One module under its PyTorch and its Flax name.

    Attributes:
      torch: its name with dots, relative to the backbone.
      flax: its path in the variables, with slashes.
      kind: a key of `PARAM_MAPS`.
    """

    torch: str
    flax: str
    kind: str


class ParamMap(NamedTuple):
    """One array of a module under its PyTorch and its Flax name.

    Attributes:
      torch: its name relative to the module's; "" if the module is the array.
      flax: (collection, name).
      load: converts an array from PyTorch's layout to Flax's.
      save: the inverse of `load`.
    """

    torch: str
    flax: tuple[str, str]
    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _transposed(x: np.ndarray) -> np.ndarray:
    return x.T


_BIAS = ParamMap("bias", ("params", "bias"), _same, _same)
_SCALE = ParamMap("weight", ("params", "scale"), _same, _same)
PARAM_MAPS = {
    "conv": (
        # OIHW <-> HWIO; in a depthwise convolution I is 1.
        ParamMap(
            "weight",
            ("params", "kernel"),
            lambda x: x.transpose(2, 3, 1, 0),
            lambda x: x.transpose(3, 2, 0, 1),
        ),
        _BIAS,
    ),
    "linear": (ParamMap("weight", ("params", "kernel"), _transposed, _transposed), _BIAS),
    # A 1x1 convolution in PyTorch, a linear layer in Flax.
    "linear1x1": (
        ParamMap(
            "weight",
            ("params", "kernel"),
            lambda x: x.reshape(x.shape[:2]).T,
            lambda x: x.T[:, :, None, None],
        ),
        _BIAS,
    ),
    "batch_norm": (
        _SCALE,
        _BIAS,
        ParamMap("running_mean", ("batch_stats", "mean"), _same, _same),
        ParamMap("running_var", ("batch_stats", "var"), _same, _same),
    ),
    "layer_norm": (_SCALE, _BIAS),
    "array": (ParamMap("", ("params", ""), _same, _same),),
}
