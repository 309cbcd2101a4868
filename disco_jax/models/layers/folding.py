"""A network that is never trained: BatchNorm inside the layers before it, kernels in half."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from disco_jax.models.encoder import Network, Variables
from disco_jax.models.layers.norm import BatchNorm
from disco_jax.models.layers.packing import ColumnConv

Path = tuple[str, ...]


def still(network: Network, variables: Variables, size: int) -> Variables:
    """What `network` computes with, where its variables do not change.

    Kernels have the dtype of the computation, which every step would cast them to. On stored
    statistics ("running") BatchNorm is a factor and an offset: the layer before it takes the
    factor in, and a bias is left, which is how `BatchNorm` tells.

    Args:
      network: encodes with `variables`; of its parts the prototypes are left as they are.
      variables: {"params", "batch_stats"}, NumPy arrays or tracers.
      size: of the images in px.

    Returns:
      {"params", "batch_stats"}; the same embeddings, up to rounding where BatchNorm went.
    """
    if network.norm == "running":
        variables = _folded(variables, _before(network, variables, size))
    dtype = network.encoder.backbone.dtype

    def stored(path: Any, leaf: Any) -> Any:
        # Convolutions and linear layers; prototypes, in float32 always, have other names.
        return leaf.astype(dtype) if path[-1].key == "kernel" else leaf

    params = jax.tree_util.tree_map_with_path(stored, variables["params"])
    return {**variables, "params": params}


def _before(
    network: Network, variables: Variables, size: int
) -> dict[Path, tuple[Path, BatchNorm]]:
    """BatchNorm's path -> that of the layer whose output it gets, and itself."""
    made: list[tuple[Any, Path]] = []  # what layers returned, kept so that no identity comes twice
    found: dict[Path, tuple[Path, BatchNorm]] = {}

    def watch(call, arguments, keywords, context):
        module = context.module
        if isinstance(module, BatchNorm):
            path = next((path for out, path in made if out is arguments[0]), None)
            if path:  # else what BatchNorm gets is no layer's output, and it stays
                found[module.path] = path, module
        out = call(*arguments, **keywords)
        if isinstance(module, (nn.Conv, nn.Dense, ColumnConv)):
            made.append((out, module.path))
        return out

    def run(variables):
        images = jnp.zeros((1, size, size, 3))
        with nn.intercept_methods(watch):
            return network.encoder.apply(variables, images, norm="running")

    jax.eval_shape(run, variables)
    return found


def _folded(
    variables: Variables, before: Mapping[Path, tuple[Path, BatchNorm]]
) -> dict[str, dict[str, Any]]:
    params = traverse_util.flatten_dict(variables["params"])
    stats = traverse_util.flatten_dict(variables["batch_stats"])
    for path, (layer, norm) in before.items():
        mean, var = stats.pop((*path, "mean")), stats.pop((*path, "var"))
        factor = params.pop((*path, "scale")) / (var + norm.epsilon) ** 0.5
        offset = params[(*path, "bias")] - mean * factor
        kernel = (*layer, "kernel")
        params[kernel] = params[kernel] * factor.reshape((1,) * (params[kernel].ndim - 1) + (-1,))
        if (*layer, "bias") in params:
            offset = offset + params[(*layer, "bias")] * factor
            params[(*layer, "bias")] = params[(*layer, "bias")] * 0
        params[(*path, "bias")] = offset
    return {
        "params": traverse_util.unflatten_dict(params),
        "batch_stats": traverse_util.unflatten_dict(stats),
    }
