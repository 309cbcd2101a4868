"""Lists every array of a network under its PyTorch and Flax names, for reading and writing."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from disco_jax.convert.names import PARAM_MAPS, ModuleMap, ParamMap
from disco_jax.convert.network import Head, Prefix
from disco_jax.models.encoder import Encoder


class Entry(NamedTuple):
    """One array of a network.

    Attributes:
      torch: its full key in a state dict.
      flax: its path in the variables: (collection, module, ..., name).
      param: converts the array between the two layouts.
    """

    torch: str
    flax: tuple[str, ...]
    param: ParamMap


_PROTOTYPES = {
    "weight": ParamMap("weight", ("params", "kernel"), lambda x: x.T, lambda x: x.T),
    "weight_v": ParamMap("weight_v", ("params", "kernel"), lambda x: x.T, lambda x: x.T),
    "weight_g": ParamMap(
        "weight_g", ("params", "scale"), lambda x: np.reshape(x, -1), lambda x: x[:, None]
    ),
}


def entries(
    encoder: Encoder, modules: Callable[[Any], Iterator[ModuleMap]], prefix: Prefix, head: Head
) -> Iterator[Entry]:
    """Yields every array that a state dict can hold for `encoder`.

    Includes biases that the network may lack.

    Args:
      encoder: the network.
      modules: yields the modules of its backbone under both names.
      prefix: of the keys.
      head: the names of the head's layers.
    """
    for module in modules(encoder.backbone):
        yield from _module(prefix.root + prefix.backbone, module, "backbone")
    for module in _head_modules(encoder, head):
        yield from _module(prefix.head or prefix.root, module, "head")
    for i, torch in enumerate(head.prototypes):
        weight_norm = getattr(encoder.prototypes, "weight_norm", False)
        for name in ("weight_v", "weight_g") if weight_norm else ("weight",):
            param = _PROTOTYPES[name]
            flax = ("params", "prototypes", f"{param.flax[1]}{i}")
            yield Entry(f"{prefix.root}{torch}.{name}", flax, param)


def _module(prefix: str, module: ModuleMap, part: str) -> Iterator[Entry]:
    for param in PARAM_MAPS[module.kind]:
        torch = f"{prefix}{module.torch}" + (f".{param.torch}" if param.torch else "")
        collection, name = param.flax
        path = (*module.flax.split("/"), name) if name else tuple(module.flax.split("/"))
        yield Entry(torch, (collection, part, *path), param)


def _head_modules(encoder: Encoder, head: Head) -> Iterator[ModuleMap]:
    linear, norm = head_layers(encoder) if head.linear else ([], [])
    for torch, flax in zip(head.linear, linear, strict=True):
        yield ModuleMap(f"{head.root}{torch}", flax, "linear")
    for torch, flax in zip(head.norm, norm, strict=True):
        yield ModuleMap(f"{head.root}{torch}", flax, "batch_norm")


def head_layers(encoder: Encoder) -> tuple[list[str], list[str]]:
    """Returns the Flax names of the head's linear and BatchNorm layers, in computation order."""
    head: Any = encoder.head
    kind = type(head).__name__
    if kind == "Identity":
        return [], []
    if kind == "RegressionHead":
        return ["hidden1", "out1", "hidden2", "out2"], ["hidden1_bn", "hidden2_bn"]
    layers = head.layers if head.hidden else 1
    hidden = [f"hidden{i}" if i > 1 else "hidden" for i in range(1, layers)]
    norms = [f"{name}_bn" for name in hidden if head.batch_norm]
    return [*hidden, "out"], [*norms, *(["out_bn"] if head.out_norm else [])]
