"""Folding for networks without updates: BatchNorm into the layer before, kernels in half."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from disco_jax.models.encoder import Network, Variables
from disco_jax.models.layers.norm import BatchNorm
from disco_jax.models.layers.packing import PackedConv

Path = tuple[str, ...]


def fold_batch_norm(network: Network, variables: Variables, size: int) -> Variables:
    """Returns variables of a network that never changes, prepared for speed.

    Kernels get the dtype of the computation, to which every step would cast them. On stored
    statistics ("running") BatchNorm is a factor and an offset: the layer before takes the factor,
    and only a bias remains, by which `BatchNorm` recognizes the case. Returns `variables` as they
    are if the network's `Compute.fold_frozen` is off.

    Args:
      network: the network; its prototypes are not changed.
      variables: {"params", "batch_stats"} of NumPy arrays or tracers.
      size: size of the images in px.

    Returns:
      {"params", "batch_stats"} with which the network computes the same embeddings, up to rounding
      if BatchNorm has been folded.
    """
    compute = network.encoder.backbone.compute
    if not compute.fold_frozen:
        return variables
    if network.norm == "running":
        variables = _fold(variables, _foldable(network, variables, size))

    def cast(path: Any, leaf: Any) -> Any:
        # Convolutions and linear layers. Prototypes, always in float32, have other names.
        return leaf.astype(compute.dtype) if path[-1].key == "kernel" else leaf

    params = jax.tree_util.tree_map_with_path(cast, variables["params"])
    return {**variables, "params": params}


def _foldable(
    network: Network, variables: Variables, size: int
) -> dict[Path, tuple[Path, BatchNorm]]:
    """Returns {path of a BatchNorm: (path of the layer whose output it normalizes, itself)}."""
    # Outputs are kept alive, so that no other object can have their identity.
    outputs: list[tuple[Any, Path]] = []
    foldable: dict[Path, tuple[Path, BatchNorm]] = {}

    def watch(call, arguments, keywords, context):
        module = context.module
        if isinstance(module, BatchNorm):
            path = next((path for out, path in outputs if out is arguments[0]), None)
            if path:  # otherwise its input is not the output of a layer, and it is not folded
                foldable[module.path] = path, module
        out = call(*arguments, **keywords)
        if isinstance(module, (nn.Conv, nn.Dense, PackedConv)):
            outputs.append((out, module.path))
        return out

    def run(variables):
        images = jnp.zeros((1, size, size, 3))
        with nn.intercept_methods(watch):
            return network.encoder.apply(variables, images, norm="running")

    jax.eval_shape(run, variables)
    return foldable


def _fold(
    variables: Variables, foldable: Mapping[Path, tuple[Path, BatchNorm]]
) -> dict[str, dict[str, Any]]:
    """Moves the factor and the mean of each BatchNorm into kernel and bias of its layer."""
    params = traverse_util.flatten_dict(variables["params"])
    stats = traverse_util.flatten_dict(variables["batch_stats"])
    for path, (layer, norm) in foldable.items():
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
