"""Features of a whole split, extracted once; every probe reads them."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from disco_jax import errors, models
from disco_jax.data import pipeline, views
from disco_jax.data.base import Source
from disco_jax.models.encoder import OUTPUTS, Encoder, Variables
from disco_jax.ops.collectives import AXIS
from disco_jax.train import checkpoint, workdir
from disco_jax.train.state import everywhere


@dataclasses.dataclass(frozen=True)
class Features:
    """What a network makes of a split, in the order of the split; no columns if not asked for.

    Attributes:
      features: f32[N, F], pooled.
      embedding: f32[N, D], after the head, not normalised.
      labels: i32[N], -1 where there is none.
      hidden: f32[N, W], what the head's last layer reads.
    """

    features: np.ndarray
    embedding: np.ndarray
    labels: np.ndarray
    hidden: np.ndarray | None = None

    def rows(self, chosen: np.ndarray) -> "Features":
        """Some of the images: whole numbers or bool[N]."""
        return Features(
            self.features[chosen],
            self.embedding[chosen],
            self.labels[chosen],
            None if self.hidden is None else self.hidden[chosen],
        )


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
    encoder = _encoder(config)
    like = jax.eval_shape(lambda: encoder.create(0, config.augment.size))
    if not checkpoint.has(run, network):
        raise errors.UserError(
            f"config.network={network!r}, but the checkpoints of {run} hold no such network (an "
            "import and a method without one have none). Set --config.network=student."
        )
    variables, step = checkpoint.load(run, network, like)
    return Trained(encoder, variables, config, step)


def untrained(config: ConfigDict) -> Trained:
    """The student of a config with its initial weights: what a probe finds without training."""
    encoder = _encoder(config)
    return Trained(encoder, encoder.create(config.seed, config.augment.size), config, 0)


def _encoder(config: ConfigDict) -> Encoder:
    compute = models.Compute(models.compute_dtype(config.dtype)).for_inference(config)
    return models.build_encoder(config.student, compute)


def extract(
    encoder: Encoder,
    variables: Variables,
    batches: Iterable[Mapping[str, np.ndarray]],
    recipe: views.Recipe,
    outputs: Sequence[str] = ("features", "embedding"),
    blocks: int = 1,
    mirrored: bool = False,
) -> Features:
    """Encodes every image once, on all devices, BatchNorm on stored statistics.

    Args:
      encoder: the network.
      variables: its weights.
      batches: this host's {"image": u8[b, S, S, 3], "label": i32[b], "mask": bool[b]}, all of one
        size that the local devices divide, as many on each host; rows where the mask is false are
        padding and left out.
      recipe: for the normalisation.
      outputs: what is wanted of `encoder.OUTPUTS`; the rest has no columns.
      blocks: see `Encoder.read`.
      mirrored: left and right change places in every image.

    Returns:
      The features of all hosts' images, host after host: the stored order of a source that hosts
      share.
    """

    local = tuple(jax.local_devices())
    apply = _compiled(encoder, recipe, tuple(outputs), blocks, mirrored, local)
    variables, devices = everywhere(variables, local), len(local)
    parts: list[list[dict[str, np.ndarray]]] = []  # batch -> host -> columns
    for batch in batches:
        made = jax.device_get(apply(variables, pipeline.to_devices(batch["image"], devices)))
        columns = {name: rows.reshape(-1, rows.shape[-1]) for name, rows in made.items()}
        parts.append(_of_hosts({**columns, "labels": batch["label"]}, batch["mask"]))
    by_host = [rows for host in zip(*parts, strict=True) for rows in host]
    found = {name: np.concatenate([p[name] for p in by_host]) for name in (*outputs, "labels")}
    empty = np.zeros((len(found["labels"]), 0), np.float32)
    return Features(**{name: empty for name in OUTPUTS if name not in outputs}, **found)


@functools.lru_cache(maxsize=8)  # a network is looked at again and again while it trains
def _compiled(
    encoder: Encoder,
    recipe: views.Recipe,
    outputs: tuple[str, ...],
    blocks: int,
    mirrored: bool,
    devices: tuple[jax.Device, ...],
) -> Any:
    """(variables, u8[devices, B, S, S, 3]) -> {output: f32[devices, B, D]}."""

    def encode(variables: Variables, images: jax.Array) -> dict[str, jax.Array]:
        images = images[:, :, ::-1] if mirrored else images
        made: Any = encoder.apply(
            variables,
            recipe.plain(images),
            norm="running",
            outputs=outputs,
            blocks=blocks,
            method="read",
        )
        return made

    return jax.pmap(encode, AXIS, in_axes=(None, 0), devices=devices)


def _of_hosts(columns: dict[str, np.ndarray], mask: np.ndarray) -> list[dict[str, np.ndarray]]:
    """The rows of a batch that are no padding, for each host."""
    if jax.process_count() == 1:
        return [{name: rows[mask] for name, rows in columns.items()}]
    columns, masks = multihost_utils.process_allgather((columns, mask))
    return [{n: rows[h][m] for n, rows in columns.items()} for h, m in enumerate(masks)]


def of_split(
    trained: Trained,
    source: Source,
    split: str,
    batch_size: int,
    outputs: Sequence[str] = ("features", "embedding"),
    blocks: int = 1,
    limit: int = 0,
    mirrored: bool = False,
) -> Features:
    """`extract` on a split of a source, resized and cropped as the run's config says.

    Args:
      trained: a network and its config, whose `data` and `augment` say how images are prepared.
      source: images, shared between the hosts.
      split: of it.
      batch_size: images encoded at once by each host.
      outputs: see `extract`.
      blocks: see `extract`.
      limit: no more than this many images over all hosts; 0: all.
      mirrored: see `extract`.

    Raises:
      UserError: the network has no such output, a label is missing, or the split is empty.
    """
    data, augment = trained.config.data, trained.config.augment
    check_outputs(trained, outputs, blocks)
    if not source.count(split):
        raise errors.UserError(f"Split {split!r} of {source.name} is empty.")
    devices = jax.local_device_count()
    batches = source.evaluate(
        split,
        augment.size,
        data.eval_resize,
        augment.interpolation,
        -(-batch_size // devices) * devices,
        limit,
    )
    recipe = views.build(augment, trained.config.views)
    found = extract(trained.encoder, trained.variables, batches, recipe, outputs, blocks, mirrored)
    if (found.labels < 0).any():
        raise unlabelled(source, split)
    return found


def classes(source: Source, split: str) -> int:
    """How many labels there are.

    Raises:
      UserError: nothing is labelled.
    """
    if source.num_classes is None:
        raise unlabelled(source, split)
    return source.num_classes


def unlabelled(source: Source, split: str) -> errors.UserError:
    """The error for a split that has images without a label."""
    return errors.UserError(
        f"Split {split!r} of {source.name} has images without a label; kNN and linear probes "
        "need labels: for a folder, one sub-folder a class."
    )


def check_outputs(trained: Trained, outputs: Sequence[str], blocks: int = 1) -> None:
    """Refuses outputs that the network does not have.

    Raises:
      UserError: for an unknown output, one of a head that is not there, or blocks that are not.
    """
    spec = trained.config.student
    for output in outputs:
        if output not in OUTPUTS:
            raise errors.unknown("config.output", output, OUTPUTS)
        if output != "features" and spec.head == "none":
            raise errors.UserError(
                f"config.output={output!r}, but the checkpoint holds {spec.backbone} without a "
                "head. Set --config.output=features."
            )
        if output == "hidden" and (spec.head == "regression" or not spec.hidden):
            raise errors.UserError(
                f"config.output='hidden', but the head ({spec.head}, hidden={spec.hidden}) has no "
                "hidden layer. Set --config.output=features or embedding."
            )
    most = trained.encoder.backbone.readable_blocks
    if not 1 <= blocks <= most:
        raise errors.UserError(
            f"config.blocks={blocks}: {spec.backbone} has {most} to read"
            + (", as it is no ViT." if most == 1 else ".")
        )
