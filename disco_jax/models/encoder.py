"""Encoder = backbone + adapter? + head + prototypes?; how it encodes the views of a method."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.models.norm import MODES
from disco_jax.ops.collectives import shuffle, unshuffle

Variables = Mapping[str, Any]
# Keys of views from here on are dropout's; below, shuffling's.
_DROPOUT = 1 << 16


# What `Encoder.read` gives.
OUTPUTS = ("features", "embedding", "hidden")


class Encoded(NamedTuple):
    """What a network says of a batch of images.

    Attributes:
      features: f32[B, F], after pooling; what linear probes and kNN read.
      embedding: f32[B, D], after the head; of length 1 only where the head itself ends so
        (SwAV, SimCLR, DINO).
      scores: f32[B, K], of the embedding on the prototypes; None without them.
    """

    features: Array
    embedding: Array
    scores: Array | None = None


class Encoder(nn.Module):
    """A backbone and the head on top of it.

    Attributes:
      backbone: float[B, H, W, 3], norm -> f32[B, F].
      head: float[B, F], norm -> f32[B, D].
      adapter: float[B, F] -> what the head reads instead; RETRO's.
      prototypes: f32[B, D] -> f32[B, K].
    """

    backbone: nn.Module
    head: nn.Module
    adapter: nn.Module | None = None
    prototypes: nn.Module | None = None

    def __call__(self, images: Array, *, norm: str) -> Encoded:
        """Encodes float[B, H, W, 3] normalised images; `norm` is "local", "sync" or "running"."""
        features = self.backbone(images, norm=norm)
        adapted = features if self.adapter is None else self.adapter(features)
        embedding = self.head(adapted, norm=norm)
        scores = None if self.prototypes is None else self.prototypes(embedding)
        return Encoded(features, embedding, scores)

    def read(self, images: Array, *, norm: str, outputs: Iterable[str], blocks: int = 1):
        """What evaluations ask of a network.

        Args:
          images: float[B, H, W, 3], normalised.
          norm: see `__call__`.
          outputs: names in `OUTPUTS`.
          blocks: of a ViT: the class tokens of so many last blocks are the features.

        Returns:
          {output: f32[B, D]}: "features", pooled; "embedding", after the head; "hidden", what the
          head's last layer reads.
        """
        several = {"blocks": blocks} if blocks > 1 else {}
        made = {"features": self.backbone(images, norm=norm, **several)}
        if set(outputs) - {"features"}:
            last = made["features"]
            last = last[:, last.shape[-1] - last.shape[-1] // blocks :]
            adapted = last if self.adapter is None else self.adapter(last)
            for name in sorted({"embedding", "hidden"} & set(outputs)):
                asked = {"hidden": True} if name == "hidden" else {}
                made[name] = self.head(adapted, norm=norm, **asked)
        return {name: made[name] for name in outputs}

    def create(self, seed: int, size: int) -> Variables:
        """Fresh {"params": ..., "batch_stats": ...} for images of `size` px; compiles nothing."""
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        rng = jax.random.key(seed)
        variables = self.lazy_init(rng, images, norm="running")
        return {"batch_stats": {}, **variables}

    def normalised(self) -> bool:
        """Whether the network itself ends on the unit sphere."""
        return getattr(self.head, "unit", False)


@dataclasses.dataclass(frozen=True)
class Network:
    """An encoder and the statistics that its BatchNorm layers use while training.

    Attributes:
      encoder: any module with `Encoder`'s call.
      norm: "local", "sync", "shuffle" or "running"; see `BatchNorm` and `collectives.shuffle`.
    """

    encoder: nn.Module
    norm: str = "local"

    def __post_init__(self):
        assert self.norm in MODES, self.norm


def encode(
    network: Network,
    variables: Variables,
    images: Mapping[int, Array],
    views: Iterable[int],
    rng: Array,
    dropout: bool = False,
) -> tuple[dict[int, Encoded], Any]:
    """Encodes views one after the other, each with its own batch statistics.

    The stored statistics pass from view to view, so two views update them twice, as two forward
    passes of the papers' codes do.

    Args:
      network: what encodes.
      variables: {"params": ..., "batch_stats": ...} of `network.encoder`.
      images: view -> f32[B, H, W, 3].
      views: which of them to encode.
      rng: key for "shuffle" and dropout, equal on all replicas.
      dropout: whether dropout and stochastic depth act, where the network has them.

    Returns:
      view -> `Encoded`, in this replica's order, and the new batch_stats.
    """
    encoded, stats = {}, variables["batch_stats"]
    for view in views:
        current = {**variables, "batch_stats": stats}
        x, norm = images[view], network.norm
        if norm == "shuffle":
            x, order = shuffle(jax.random.fold_in(rng, view), x)
            norm = "local"
        drops = {"dropout": jax.random.fold_in(rng, _DROPOUT + view)} if dropout else {}
        out, new = network.encoder.apply(current, x, norm=norm, mutable=["batch_stats"], rngs=drops)
        if network.norm == "shuffle":
            out = jax.tree.map(lambda rows, order=order: unshuffle(rows, order), out)
        encoded[view], stats = out, new.get("batch_stats", stats)
    return encoded, stats
