"""Encoder = backbone + adapter? + head + prototypes?; how it encodes the views of a method."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.models.layers.feature_maps import COLLECTION, by_size
from disco_jax.models.layers.norm import MODES
from disco_jax.ops.collectives import shuffle, unshuffle

Variables = Mapping[str, Any]
# Keys of views from here on are dropout's; below, shuffling's.
_DROPOUT = 1 << 16


# What `Encoder.read` gives.
OUTPUTS = ("features", "embedding", "hidden")


class Encoded(NamedTuple):
    """What a network says of a batch of images.

    Attributes:
      features: f32[B, F], after pooling; what linear probes and kNN read. None, as the embedding
        may be too, only of a teacher's outputs that were kept, where no objective reads it.
      embedding: f32[B, D], after the head; of length 1 only where the head itself ends so
        (SwAV, SimCLR, DINO).
      scores: f32[B, K], of the embedding on the prototypes; None without them.
      maps: float[B, H, W, C], what leaves the backbone's stages, the last of each size, the
        finest first; None unless an objective reads them, () of networks without.
    """

    features: Array | None
    embedding: Array | None
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
        return self._head(self.backbone(images, norm=norm), norm)

    def _head(self, features: Array, norm: str) -> Encoded:
        adapted = features if self.adapter is None else self.adapter(features)
        embedding = self.head(adapted, norm=self.head_norm or norm)
        scores = None if self.prototypes is None else self.prototypes(embedding)
        return Encoded(features, embedding, scores)

    def together(self, images: Sequence[Array], *, norm: str) -> Encoded:
        """Encodes images of several sizes; the rows of the result follow one another.

        The backbone is called once a size and the head once for all, as SwAV's and DINO's codes
        do: batch statistics in the head are those of all sizes together.

        Args:
          images: float[N, H, W, 3] each, normalised.
          norm: see `__call__`.
        """
        features = jnp.concatenate([self.backbone(x, norm=norm) for x in images])
        return self._head(features, norm)

    def score(self, embedding: Array) -> Array:
        """f32[N, D] -> f32[N, K]: embeddings on the prototypes, which there must be."""
        assert self.prototypes is not None
        return self.prototypes(embedding)

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
                made[name] = self.head(adapted, norm=self.head_norm or norm, **asked)
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
      encoder: what encodes; tests put other modules with its call in its place.
      norm: "local", "sync", "shuffle" or "running"; see `BatchNorm` and `collectives.shuffle`.
      rescale: a factor and an offset for each channel, which turn images with the recipe's
        normalisation into images with the one this network was trained with; None: the same.
      grouped: views of one size go through the network together and share batch statistics, as
        SwAV, DINO and SSLight train; else one after the other, as MoCo and DisCo do.
      exchange: how "shuffle" moves images, see `collectives.shuffle`.
      carried: dtype in which it does: that of the computation.
    """

    encoder: Encoder
    norm: str = "local"
    rescale: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    grouped: bool = False
    exchange: str = "gather"
    carried: jnp.dtype = jnp.float32

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
    """Encodes views one after the other, or all of them together if the network is `grouped`.

    One after the other, each has its own batch statistics, and the stored ones pass from view to
    view: two views update them twice, as two forward passes of the papers' codes do.

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
    encoded, stats, views = {}, variables["batch_stats"], tuple(views)
    for group in [views] if network.grouped else [(view,) for view in views]:
        current = {**variables, "batch_stats": stats}
        mine = {view: _rescaled(images[view], network.rescale) for view in group}
        orders = {}
        if network.norm == "shuffle":
            for view in group:
                # Images travel as the network takes them: half as many bytes in bfloat16.
                sent = mine[view].astype(network.carried)
                key = jax.random.fold_in(rng, view)
                mine[view], orders[view] = shuffle(key, sent, network.exchange)
        drops = {"dropout": jax.random.fold_in(rng, _DROPOUT + group[0])} if dropout else {}
        out, stats = _apply(network, current, mine, drops, maps)
        for view, order in orders.items():
            out[view] = jax.tree.map(lambda rows, order=order: unshuffle(rows, order), out[view])
        encoded.update(out)
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


def _apply(
    network: Network,
    variables: Variables,
    images: Mapping[int, Array],
    rngs: dict[str, Array],
    maps: bool,
) -> tuple[dict[int, Encoded], Any]:
    """The views of `images` in one application: one call of the backbone a size.

    Feature maps are of one size: where they are read, views go one after the other.
    """
    norm = "local" if network.norm == "shuffle" else network.norm
    sizes: dict[tuple[int, ...], list[int]] = {}
    for view, x in images.items():
        sizes.setdefault(x.shape, []).append(view)
    # The views of an image stand side by side, so that an image's place in the global batch, from
    # which dropout draws, does not depend on the number of devices.
    stacked = [_side_by_side([images[view] for view in group]) for group in sizes.values()]
    kept = ["batch_stats", COLLECTION] if maps else ["batch_stats"]
    apply = functools.partial(network.encoder.apply, variables, norm=norm, mutable=kept, rngs=rngs)
    out, new = apply(stacked[0]) if len(stacked) == 1 else apply(stacked, method="together")
    if maps:
        out = out._replace(maps=by_size(new.get(COLLECTION, {})))
    encoded, start = {}, 0
    for rows, group in zip(stacked, sizes.values(), strict=True):
        stop = start + rows.shape[0]
        for i, view in enumerate(group):
            own = slice(start + i, stop, len(group))
            encoded[view] = jax.tree.map(lambda x, own=own: x[own], out)
        start = stop
    return encoded, new.get("batch_stats", variables["batch_stats"])


def _side_by_side(views: Sequence[Array]) -> Array:
    """[B, ...] each -> [B * len(views), ...]: all views of the first image, then of the second."""
    if len(views) == 1:
        return views[0]
    return jnp.stack(views, axis=1).reshape(-1, *views[0].shape[1:])
