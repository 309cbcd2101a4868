"""Encoder = backbone + adapter? + head + prototypes?; how it encodes the views of a method."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.models.maps import COLLECTION, by_size
from disco_jax.models.norm import MODES
from disco_jax.ops.collectives import shuffle, unshuffle

Variables = Mapping[str, Any]
# Keys of views from here on are dropout's; below, shuffling's.
_DROPOUT = 1 << 16


class Encoded(NamedTuple):
    """What a network says of a batch of images.

    Attributes:
      features: f32[B, F], after pooling; what linear probes and kNN read.
      embedding: f32[B, D], after the head; of length 1 only where the head itself ends so
        (SwAV, SimCLR, DINO).
      scores: f32[B, K], of the embedding on the prototypes; None without them.
      maps: float[B, H, W, C], what leaves the backbone's stages, the last of each size, the
        finest first; None unless an objective reads them, () of networks without.
    """

    features: Array
    embedding: Array
    scores: Array | None = None
    maps: tuple[Array, ...] | None = None


class Encoder(nn.Module):
    """A backbone and the head on top of it.

    Attributes:
      backbone: float[B, H, W, 3], norm -> f32[B, F].
      head: float[B, F], norm -> f32[B, D].
      adapter: float[B, F] -> what the head reads instead; RETRO's.
      prototypes: f32[B, D] -> f32[B, K].
      head_norm: BatchNorm mode of the head; "": the one that the call is given.
    """

    backbone: nn.Module
    head: nn.Module
    adapter: nn.Module | None = None
    prototypes: nn.Module | None = None
    head_norm: str = ""

    def __call__(self, images: Array, *, norm: str) -> Encoded:
        """Encodes float[B, H, W, 3] normalised images; `norm` is "local", "sync" or "running"."""
        features = self.backbone(images, norm=norm)
        adapted = features if self.adapter is None else self.adapter(features)
        embedding = self.head(adapted, norm=self.head_norm or norm)
        scores = None if self.prototypes is None else self.prototypes(embedding)
        return Encoded(features, embedding, scores)

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
      rescale: a factor and an offset for each channel, which turn images with the recipe's
        normalisation into images with the one this network was trained with; None: the same.
    """

    encoder: nn.Module
    norm: str = "local"
    rescale: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __post_init__(self):
        assert self.norm in MODES, self.norm


def encode(
    network: Network,
    variables: Variables,
    images: Mapping[int, Array],
    views: Iterable[int],
    rng: Array,
    dropout: bool = False,
    maps: bool = False,
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
      maps: whether somebody reads the backbone's feature maps.

    Returns:
      view -> `Encoded`, in this replica's order, and the new batch_stats.
    """
    encoded, stats = {}, variables["batch_stats"]
    for view in views:
        current = {**variables, "batch_stats": stats}
        x, norm = _rescaled(images[view], network.rescale), network.norm
        if norm == "shuffle":
            x, order = shuffle(jax.random.fold_in(rng, view), x)
            norm = "local"
        drops = {"dropout": jax.random.fold_in(rng, _DROPOUT + view)} if dropout else {}
        kept = ["batch_stats", COLLECTION] if maps else ["batch_stats"]
        out, new = network.encoder.apply(current, x, norm=norm, mutable=kept, rngs=drops)
        if maps:
            out = out._replace(maps=by_size(new.get(COLLECTION, {})))
        if network.norm == "shuffle":
            out = jax.tree.map(lambda rows, order=order: unshuffle(rows, order), out)
        encoded[view], stats = out, new.get("batch_stats", stats)
    return encoded, stats


def _rescaled(images: Array, rescale: tuple[tuple[float, ...], ...] | None) -> Array:
    if rescale is None:
        return images
    factor, offset = (jnp.asarray(x, images.dtype).reshape(1, 1, 1, -1) for x in rescale)
    return images * factor + offset


def rescaling(
    own: tuple[tuple[float, ...], tuple[float, ...]],
    given: tuple[tuple[float, ...], tuple[float, ...]],
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """`Network.rescale` for a network of mean and deviation `own` on images normalised by `given`.

    None where both are equal. (x - m) / s of the network is
    y * s' / s + (m' - m) / s of the recipe's y = (x - m') / s'.
    """
    (mean, std), (their_mean, their_std) = own, given
    if tuple(mean) == tuple(their_mean) and tuple(std) == tuple(their_std):
        return None
    factor = tuple(theirs / ours for theirs, ours in zip(their_std, std, strict=True))
    offset = tuple((m_ - m) / s for m_, m, s in zip(their_mean, mean, std, strict=True))
    return factor, offset
