"""Features of a whole split, extracted once; every probe reads them."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from disco_jax import errors, models
from disco_jax.data import pipeline, views
from disco_jax.data.base import Source
from disco_jax.models.encoder import Encoder, Variables
from disco_jax.ops.collectives import AXIS
from disco_jax.train import checkpoint, workdir
from disco_jax.train.state import everywhere


@dataclasses.dataclass(frozen=True)
class Features:
    """What a network makes of a split, in the order of the split.

    Attributes:
      features: f32[N, F], pooled.
      embedding: f32[N, D], after the head, not normalised.
      labels: i32[N], -1 where there is none.
    """

    features: np.ndarray
    embedding: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network of a run, ready to be evaluated."""

    encoder: Encoder
    variables: Variables
    config: ConfigDict
    step: int


NETWORKS = ("student", "momentum")


def load(run: str, network: str = "student") -> Trained:
    """The newest good checkpoint of `run`.

    Args:
      run: a run's directory.
      network: "student", or "momentum" for its EMA copy.

    Raises:
      UserError: when there is no such run, checkpoint or network.
    """
    if network not in NETWORKS:
        raise errors.unknown("config.network", network, NETWORKS)
    config = workdir.read_config(run)
    encoder = models.build_encoder(config.student, config.dtype)
    like = jax.eval_shape(lambda: encoder.create(0, config.augment.size))
    variables, step = checkpoint.load(run, network, like)
    return Trained(encoder, variables, config, step)


def untrained(config: ConfigDict) -> Trained:
    """The student of a config with its initial weights: what a probe finds without training."""
    encoder = models.build_encoder(config.student, config.dtype)
    return Trained(encoder, encoder.create(config.seed, config.augment.size), config, 0)


def extract(
    encoder: Encoder,
    variables: Variables,
    batches: Iterable[Mapping[str, np.ndarray]],
    recipe: views.Recipe,
) -> Features:
    """Encodes every image once, on all local devices, BatchNorm on stored statistics.

    Args:
      encoder: the network.
      variables: its weights.
      batches: {"image": u8[b, S, S, 3], "label": i32[b], "mask": bool[b]}, all of one size that
        the local devices divide; rows where the mask is false are padding and left out.
      recipe: for the normalisation.
    """

    def encode(variables: Variables, images: jax.Array) -> Any:
        return encoder.apply(variables, recipe.plain(images), norm="running")

    apply = jax.pmap(encode, AXIS, in_axes=(None, 0), devices=jax.local_devices())
    variables = everywhere(variables, jax.local_devices())
    devices = jax.local_device_count()
    parts = []
    for batch in batches:
        encoded = apply(variables, pipeline.to_devices(batch["image"], devices))
        encoded = jax.device_get(encoded._replace(scores=None))
        both = (encoded.features, encoded.embedding)
        rows = [x.reshape(-1, x.shape[-1])[batch["mask"]] for x in both]
        parts.append((*rows, batch["label"][batch["mask"]]))
    return Features(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def of_split(trained: Trained, source: Source, split: str, batch_size: int) -> Features:
    """`extract` on a split of a source, resized and cropped as the run's config says.

    Raises:
      UserError: when a label is missing, or the split is empty.
    """
    data, augment = trained.config.data, trained.config.augment
    if not source.count(split):
        raise errors.UserError(f"Split {split!r} of {source.name} is empty.")
    devices = jax.local_device_count()
    batches = source.evaluate(
        split,
        augment.size,
        data.eval_resize,
        augment.interpolation,
        -(-batch_size // devices) * devices,
    )
    found = extract(
        trained.encoder, trained.variables, batches, views.build(augment, trained.config.views)
    )
    if (found.labels < 0).any():
        raise errors.UserError(
            f"Split {split!r} of {source.name} has images without a label; kNN and linear probes "
            "need labels: for a folder, one sub-folder a class."
        )
    return found


def top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Percent of rows whose label is among the k highest scores.

    A label tied with others counts as ranked after those of lower index, so that equal scores do
    not all count as right.

    Args:
      scores: f32[N, C].
      labels: i32[N].
      k: how many guesses.
    """
    own = scores[np.arange(len(labels)), labels][:, None]
    lower_index = np.arange(scores.shape[1])[None, :] < labels[:, None]
    rank = (scores > own).sum(axis=1) + ((scores == own) & lower_index).sum(axis=1)
    return 100.0 * float((rank < k).mean())
