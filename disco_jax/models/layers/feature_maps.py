"""Feature maps of a backbone's stages: kept aside only where somebody reads them."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jax import Array

# Flax makes nothing of this collection at initialisation, nor where it is not asked for.
COLLECTION = "intermediates"


def keep(backbone: nn.Module, stage: int, x: Array) -> None:
    """Keeps the float[B, H, W, C] that leaves a stage; costs nothing where it is not read."""
    backbone.sow(COLLECTION, f"stage{stage}", x)


def by_size(kept: Mapping[str, Any]) -> tuple[Array, ...]:
    """The last map of every height and width, the finest first; () if nothing was kept."""
    stages = kept.get("backbone", {})
    last = {}
    for stage in sorted(name for name in stages if name.startswith("stage")):
        (x,) = stages[stage]
        last[x.shape[1:3]] = x
    return tuple(last.values())
