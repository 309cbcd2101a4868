"""Feature maps: their layout, and those of a backbone's stages for objectives that read them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jax import Array

from disco_jax.models.layers.packing import average_columns, repeat_channels, unpack_width

# Flax stores nothing in this collection at initialization or unless a caller makes it mutable.
COLLECTION = "intermediates"


@flax.struct.dataclass
class FeatureMap:
    """A feature map that hides how its columns are stored; see `packing`.

    Attributes:
      x: float[B, H, W / width_packing, width_packing * C].
      width_packing: adjacent columns that are stored in the channels; 1: the usual layout.
      parent: path of the module in whose call `Compute.conv_bn` computed it; None for other maps.
    """

    x: Array
    width_packing: int = flax.struct.field(pytree_node=False, default=1)
    parent: tuple[str, ...] | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def channels(self) -> int:
        """Channels C without packing."""
        return self.x.shape[-1] // self.width_packing

    def map(self, function: Callable[[Array], Array]) -> "FeatureMap":
        """Applies a function that is elementwise within each image."""
        return dataclasses.replace(self, x=function(self.x))

    def relu(self) -> "FeatureMap":
        """Applies max(x, 0)."""
        return self.map(nn.relu)

    def __add__(self, other: "FeatureMap") -> "FeatureMap":
        """Adds two maps of one shape; unpacks both if their layouts differ."""
        if self.width_packing != other.width_packing:
            return FeatureMap(self.unpacked() + other.unpacked())
        return FeatureMap(self.x + other.x, self.width_packing)

    def scale_channels(self, factors: Array) -> "FeatureMap":
        """Multiplies each channel of each image by a factor of float[B, C]."""
        return self.map(lambda x: x * repeat_channels(factors, self.width_packing)[:, None, None])

    def global_average(self) -> Array:
        """Averages over positions: f32[B, C]."""
        means = jnp.mean(self.x.astype(jnp.float32), axis=(1, 2))
        return average_columns(means, self.width_packing)

    def unpacked(self) -> Array:
        """Returns float[B, H, W, C]."""
        return unpack_width(self.x, self.width_packing)


def record_stage(backbone: nn.Module, stage: int, x: FeatureMap) -> None:
    """Records the output of a stage for `by_size`, if the caller makes `COLLECTION` mutable."""
    backbone.sow(COLLECTION, f"stage{stage}", x.unpacked())


def by_size(intermediates: Mapping[str, Any]) -> tuple[Array, ...]:
    """Returns the last recorded map of every height and width, finest first.

    Args:
      intermediates: the collection `COLLECTION` of an encoder.

    Returns:
      float[B, H, W, C] each; () if the backbone records none.
    """
    stages = intermediates.get("backbone", {})
    last = {}
    for stage in sorted(name for name in stages if name.startswith("stage")):
        (x,) = stages[stage]
        last[x.shape[1:3]] = x
    return tuple(last.values())
