"""Encoders (backbone, adapter, head, prototypes), and how they encode the views of a method."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.models.layers.feature_maps import COLLECTION, by_size
from disco_jax.models.layers.norm import MODES
from disco_jax.ops.collectives import shuffle, unshuffle

if TYPE_CHECKING:
    from disco_jax.models.layers.compute import Compute

Variables = Mapping[str, Any]
Normalization = tuple[tuple[float, ...], tuple[float, ...]]
# Added to a view's number to get a key for dropout; the number itself gives the key of shuffling.
_DROPOUT = 1 << 16

# Outputs that `Encoder.read` offers.
OUTPUTS = ("features", "embedding", "hidden")


class Encoded(NamedTuple):
    """Outputs of an `Encoder` for a batch of images.

    Attributes:
      features: f32[B, F], pooled; read by linear probes and kNN. It and the embedding are None only
        in cached outputs of a teacher, if no objective reads them.
      embedding: f32[B, D], after the head; of length 1 only if the head normalizes it (SwAV,
        SimCLR, DINO).
      scores: f32[B, K], the embedding's similarities to prototypes; None without prototypes.
      maps: float[B, H, W, C], the last stage output of each size, finest first; () if the backbone
        records none, None unless an objective reads them.
    """

    features: Array | None
    embedding: Array | None
    scores: Array | None = None
    maps: tuple[Array, ...] | None = None


class Encoder(nn.Module):
    """A backbone with its adapter, head and prototypes.

    Attributes:
      backbone: maps float[B, H, W, 3] and a BatchNorm mode to f32[B, F].
      head: maps float[B, F] and a BatchNorm mode to f32[B, D].
      adapter: maps float[B, F] to the input of the head (RETRO).
      prototypes: maps f32[B, D] to f32[B, K].
      head_norm: BatchNorm mode of the head; "": that of the call.
    """

    backbone: nn.Module
    head: nn.Module
    adapter: nn.Module | None = None
    prototypes: nn.Module | None = None
    head_norm: str = ""

    def __call__(self, images: Array, *, norm: str) -> Encoded:
        """Encodes images.

        Args:
          images: float[B, H, W, 3], normalized.
          norm: BatchNorm mode, "local", "sync" or "running".
        """
        return self._encode_features(self.backbone(images, norm=norm), norm)

    def _encode_features(self, features: Array, norm: str) -> Encoded:
        """Computes embedding and scores of f32[B, F]."""
        adapted = features if self.adapter is None else self.adapter(features)
        embedding = self.head(adapted, norm=self.head_norm or norm)
        scores = None if self.prototypes is None else self.prototypes(embedding)
        return Encoded(features, embedding, scores)

    def together(self, images: Sequence[Array], *, norm: str) -> Encoded:
        """Encodes images of several sizes; the outputs are concatenated along the batch.

        Calls the backbone once per size and the head once for all, as SwAV's and DINO's codes do:
        batch statistics in the head are those of all sizes together.

        Args:
          images: one float[N, H, W, 3] per size, normalized.
          norm: see `__call__`.
        """
        features = jnp.concatenate([self.backbone(x, norm=norm) for x in images])
        return self._encode_features(features, norm)

    def score(self, embedding: Array) -> Array:
        """Maps f32[N, D] to the scores f32[N, K] of prototypes, which must exist."""
        assert self.prototypes is not None
        return self.prototypes(embedding)

    def read(self, images: Array, *, norm: str, outputs: Iterable[str], blocks: int = 1):
        """Computes outputs for evaluations.

        Args:
          images: float[B, H, W, 3], normalized.
          norm: see `__call__`.
          outputs: names in `OUTPUTS`.
          blocks: for a ViT, the number of last blocks whose class tokens are the features.

        Returns:
          {output: f32[B, D]}: "features", pooled; "embedding", after the head; "hidden", the input
          of the head's last layer.
        """
        options = {"blocks": blocks} if blocks > 1 else {}
        arrays = {"features": self.backbone(images, norm=norm, **options)}
        if set(outputs) - {"features"}:
            last = arrays["features"]
            last = last[:, last.shape[-1] - last.shape[-1] // blocks :]
            adapted = last if self.adapter is None else self.adapter(last)
            for name in sorted({"embedding", "hidden"} & set(outputs)):
                options = {"hidden": True} if name == "hidden" else {}
                arrays[name] = self.head(adapted, norm=self.head_norm or norm, **options)
        return {name: arrays[name] for name in outputs}

    def create(self, seed: int, size: int) -> Variables:
        """Draws variables without compiling anything.

        Args:
          seed: seed of the initial values.
          size: size of the images in px.

        Returns:
          {"params": ..., "batch_stats": ...}.
        """
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        rng = jax.random.key(seed)
        variables = self.lazy_init(rng, images, norm="running")
        return {"batch_stats": {}, **variables}

    def normalised(self) -> bool:
        """Returns whether the head normalizes the embedding to length 1."""
        return self.head.l2_normalized

    @property
    def compute(self) -> "Compute":
        """The `Compute` of the backbone."""
        return self.backbone.compute

    def with_compute(self, compute: "Compute") -> "Encoder":
        """Returns the encoder with another `Compute` for the backbone."""
        return self.clone(backbone=self.backbone.clone(compute=compute))


@dataclasses.dataclass(frozen=True)
class Network:
    """An encoder and how a training step applies it.

    Attributes:
      encoder: the encoder; tests pass other modules with its call.
      norm: BatchNorm mode, "local", "sync", "shuffle" or "running"; see `BatchNorm` and
        `collectives.shuffle`.
      rescale: (factor, offset) per channel, which map images with the recipe's normalization to
        images with the normalization that the network was trained with; None if they are equal.
      grouped: whether views of one size pass the network together and share batch statistics, as
        in SwAV, DINO and SSLight; otherwise one after the other, as in MoCo and DisCo.
      exchange: how "shuffle" moves images, see `collectives.shuffle`.
      shuffle_dtype: dtype in which "shuffle" moves images.
    """

    encoder: Encoder
    norm: str = "local"
    rescale: Normalization | None = None
    grouped: bool = False
    exchange: str = "gather"
    shuffle_dtype: jnp.dtype = jnp.float32

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
    """Encodes views one after the other, or all together if the network is `grouped`.

    One after the other, each view has its own batch statistics, and the stored statistics pass from
    view to view: two views update them twice, as two forward passes of the papers' codes do.

    Args:
      network: the network.
      variables: {"params": ..., "batch_stats": ...} of `network.encoder`.
      images: {view: f32[B, H, W, 3]}.
      views: views to encode.
      rng: key for "shuffle" and dropout, equal on all replicas.
      dropout: whether dropout and stochastic depth are active.
      maps: whether to return the backbone's feature maps.

    Returns:
      {view: `Encoded`} in the order of this replica's images, and the new batch_stats.
    """
    encoded, stats, views = {}, variables["batch_stats"], tuple(views)
    for group in [views] if network.grouped else [(view,) for view in views]:
        current = {**variables, "batch_stats": stats}
        inputs = {view: _rescale(images[view], network.rescale) for view in group}
        orders = {}
        if network.norm == "shuffle":
            for view in group:
                # The network casts images anyway; bfloat16 halves the bytes that move.
                rows = inputs[view].astype(network.shuffle_dtype)
                key = jax.random.fold_in(rng, view)
                inputs[view], orders[view] = shuffle(key, rows, network.exchange)
        rngs = {"dropout": jax.random.fold_in(rng, _DROPOUT + group[0])} if dropout else {}
        out, stats = _apply(network, current, inputs, rngs, maps)
        for view, order in orders.items():
            out[view] = jax.tree.map(lambda rows, order=order: unshuffle(rows, order), out[view])
        encoded.update(out)
    return encoded, stats


def _rescale(images: Array, rescale: Normalization | None) -> Array:
    if rescale is None:
        return images
    factor, offset = (jnp.asarray(x, images.dtype).reshape(1, 1, 1, -1) for x in rescale)
    return images * factor + offset


def rescaling(own: Normalization, recipe: Normalization) -> Normalization | None:
    """Returns `Network.rescale` for images that the recipe normalizes.

    The network expects (x - m) / s. In terms of the recipe's y = (x - m') / s', this is
    y * s' / s + (m' - m) / s.

    Args:
      own: mean m and standard deviation s that the network was trained with.
      recipe: mean m' and standard deviation s' of the recipe.

    Returns:
      (factor, offset) per channel; None if both normalizations are equal.
    """
    (mean, std), (recipe_mean, recipe_std) = own, recipe
    if tuple(mean) == tuple(recipe_mean) and tuple(std) == tuple(recipe_std):
        return None
    factor = tuple(s_ / s for s_, s in zip(recipe_std, std, strict=True))
    offset = tuple((m_ - m) / s for m_, m, s in zip(recipe_mean, mean, std, strict=True))
    return factor, offset


def _apply(
    network: Network,
    variables: Variables,
    images: Mapping[int, Array],
    rngs: dict[str, Array],
    maps: bool,
) -> tuple[dict[int, Encoded], Any]:
    """Applies the network to all views of `images`, with one call of the backbone per size.

    Feature maps have one size: with `maps`, all views of a call must have the same size.
    """
    norm = "local" if network.norm == "shuffle" else network.norm
    sizes: dict[tuple[int, ...], list[int]] = {}
    for view, x in images.items():
        sizes.setdefault(x.shape, []).append(view)
    # The views of an image are adjacent rows. So the position of an image in the global batch, from
    # which dropout draws, does not depend on the number of devices.
    batches = [_interleave([images[view] for view in group]) for group in sizes.values()]
    mutable = ["batch_stats", COLLECTION] if maps else ["batch_stats"]
    apply = functools.partial(
        network.encoder.apply, variables, norm=norm, mutable=mutable, rngs=rngs
    )
    out, new = apply(batches[0]) if len(batches) == 1 else apply(batches, method="together")
    if maps:
        out = out._replace(maps=by_size(new.get(COLLECTION, {})))
    encoded, start = {}, 0
    for batch, group in zip(batches, sizes.values(), strict=True):
        stop = start + batch.shape[0]
        for i, view in enumerate(group):
            rows = slice(start + i, stop, len(group))
            encoded[view] = jax.tree.map(lambda x, rows=rows: x[rows], out)
        start = stop
    return encoded, new.get("batch_stats", variables["batch_stats"])


def _interleave(views: Sequence[Array]) -> Array:
    """Stacks [B, ...] arrays to [B * len(views), ...]: all views of an image, then of the next."""
    if len(views) == 1:
        return views[0]
    return jnp.stack(views, axis=1).reshape(-1, *views[0].shape[1:])
