"""Features of a whole split, extracted once and shared by all probes."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from disco_jax import errors, models
from disco_jax.data import pipeline, views
from disco_jax.data.contract import Source
from disco_jax.data.data_settings import build_views
from disco_jax.models.encoder import OUTPUTS, Encoder, Variables
from disco_jax.ops.collectives import AXIS
from disco_jax.run import checkpoint
from disco_jax.train import stored_settings
from disco_jax.train.run_settings import RunSettings
from disco_jax.train.state import replicate


@dataclasses.dataclass(frozen=True)
class Features:
    """Outputs of a network for a split, in the order of the split.

    An output that was not requested has no columns.

    Attributes:
      features: f32[N, F], pooled.
      embedding: f32[N, D], output of the head, not normalized.
      labels: i32[N], -1 for unlabelled images.
      hidden: f32[N, W], input of the head's last layer.
    """

    features: np.ndarray
    embedding: np.ndarray
    labels: np.ndarray
    hidden: np.ndarray | None = None

    def rows(self, index: np.ndarray) -> "Features":
        """Selects images by integer indices or a mask bool[N]."""
        return Features(
            self.features[index],
            self.embedding[index],
            self.labels[index],
            None if self.hidden is None else self.hidden[index],
        )


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """Network of a run, ready for evaluation.

    Attributes:
      encoder: the network.
      variables: its weights and BatchNorm statistics.
      settings: settings of the run; `data` and `augment` define how images are read.
      step: training step of the checkpoint.
    """

    encoder: Encoder
    variables: Variables
    settings: RunSettings
    step: int


NETWORKS = ("student", "momentum")


def load(run: str, network: str = "student") -> TrainedModel:
    """Loads the newest intact checkpoint of a run.

    Args:
      run: directory of the run.
      network: "student", or "momentum" for its EMA copy.

    Raises:
      UserError: if the run, its checkpoint or the network does not exist.
    """
    if network not in NETWORKS:
        raise errors.unknown("config.network", network, NETWORKS)
    settings = stored_settings.read(run)
    encoder = _encoder(settings)
    like = jax.eval_shape(lambda: encoder.create(0, settings.augment.size))
    if not checkpoint.has(run, network):
        raise errors.UserError(
            f"config.network={network!r}, but the checkpoints of {run} contain no such network "
            "(an imported network and some methods have only a student). Set "
            "--config.network=student."
        )
    variables, step = checkpoint.load(run, network, like)
    return TrainedModel(encoder, variables, settings, step)


def untrained(settings: RunSettings) -> TrainedModel:
    """Returns the student of a run with its initial weights, as a baseline for probes."""
    encoder = _encoder(settings)
    variables = encoder.create(settings.seed, settings.augment.size)
    return TrainedModel(encoder, variables, settings, 0)


def _encoder(settings: RunSettings) -> Encoder:
    compute = models.Compute(models.compute_dtype(settings.dtype)).for_inference(settings.fast)
    return models.build_encoder(settings.student, compute)


def extract(
    encoder: Encoder,
    variables: Variables,
    batches: Iterable[Mapping[str, np.ndarray]],
    recipe: views.Recipe,
    outputs: Sequence[str] = ("features", "embedding"),
    blocks: int = 1,
    mirrored: bool = False,
) -> Features:
    """Encodes every image once, on all devices, with stored BatchNorm statistics.

    Args:
      encoder: the network.
      variables: its weights.
      batches: this host's {"image": u8[b, S, S, 3], "label": i32[b], "mask": bool[b]}. All batches
        have the same size, which the local devices divide, and every host has the same number of
        them. Rows with a false mask are padding and are dropped.
      recipe: defines the normalization.
      outputs: outputs to return, see `encoder.OUTPUTS`; the others have no columns.
      blocks: see `Encoder.read`.
      mirrored: whether to flip every image horizontally.

    Returns:
      The features of all hosts' images, host after host, which is the stored order of a source that
      hosts share.
    """

    local_devices = tuple(jax.local_devices())
    apply = _compiled(encoder, recipe, tuple(outputs), blocks, mirrored, local_devices)
    variables, count = replicate(variables, local_devices), len(local_devices)
    by_batch: list[list[dict[str, np.ndarray]]] = []  # batch -> host -> columns
    for batch in batches:
        encoded = jax.device_get(apply(variables, pipeline.to_devices(batch["image"], count)))
        columns = {name: rows.reshape(-1, rows.shape[-1]) for name, rows in encoded.items()}
        by_batch.append(_of_hosts({**columns, "labels": batch["label"]}, batch["mask"]))
    by_host = [rows for host in zip(*by_batch, strict=True) for rows in host]
    arrays = {
        name: np.concatenate([part[name] for part in by_host]) for name in (*outputs, "labels")
    }
    empty = np.zeros((len(arrays["labels"]), 0), np.float32)
    return Features(**{name: empty for name in OUTPUTS if name not in outputs}, **arrays)


@functools.lru_cache(maxsize=8)  # monitoring evaluates the same network repeatedly
def _compiled(
    encoder: Encoder,
    recipe: views.Recipe,
    outputs: tuple[str, ...],
    blocks: int,
    mirrored: bool,
    devices: tuple[jax.Device, ...],
) -> Any:
    """Compiles (variables, u8[devices, B, S, S, 3]) -> {output: f32[devices, B, D]}."""

    def encode(variables: Variables, images: jax.Array) -> dict[str, jax.Array]:
        images = images[:, :, ::-1] if mirrored else images
        encoded: Any = encoder.apply(
            variables,
            recipe.plain(images),
            norm="running",
            outputs=outputs,
            blocks=blocks,
            method="read",
        )
        return encoded

    return jax.pmap(encode, AXIS, in_axes=(None, 0), devices=devices)


def _of_hosts(columns: dict[str, np.ndarray], mask: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Returns the rows of a batch without padding, for each host."""
    if jax.process_count() == 1:
        return [{name: rows[mask] for name, rows in columns.items()}]
    columns, masks = multihost_utils.process_allgather((columns, mask))
    return [{n: rows[h][m] for n, rows in columns.items()} for h, m in enumerate(masks)]


def of_split(
    trained: TrainedModel,
    source: Source,
    split: str,
    batch_size: int,
    outputs: Sequence[str] = ("features", "embedding"),
    blocks: int = 1,
    limit: int = 0,
    mirrored: bool = False,
) -> Features:
    """Runs `extract` on a split, with images resized and cropped as the run's settings say.

    Args:
      trained: a network and its settings, whose `data` and `augment` define how images are read.
      source: images, sharded across hosts.
      split: name of the split.
      batch_size: images that each host encodes at once.
      outputs: see `extract`.
      blocks: see `extract`.
      limit: maximum number of images over all hosts; 0: no limit.
      mirrored: see `extract`.

    Raises:
      UserError: if the network has no such output, a label is missing, or the split is empty.
    """
    data, augment = trained.settings.data, trained.settings.augment
    check_outputs(trained, outputs, blocks)
    if not source.count(split):
        raise errors.UserError(f"Split {split!r} of {source.name} is empty.")
    devices = jax.local_device_count()
    batches = source.evaluate(
        split,
        augment.size,
        data.eval_resize,
        eval_interpolation(trained.settings),
        -(-batch_size // devices) * devices,
        limit,
    )
    recipe = build_views(augment, trained.settings.views)
    extracted = extract(
        trained.encoder, trained.variables, batches, recipe, outputs, blocks, mirrored
    )
    if (extracted.labels < 0).any():
        raise unlabelled(source, split)
    return extracted


def eval_interpolation(settings: RunSettings) -> str:
    """Returns the filter with which evaluations of a run resize images: "bilinear" or "bicubic"."""
    return settings.data.eval_interpolation or settings.augment.interpolation


def classes(source: Source, split: str) -> int:
    """Returns the number of classes.

    Raises:
      UserError: if the source has no labels.
    """
    if source.num_classes is None:
        raise unlabelled(source, split)
    return source.num_classes


def unlabelled(source: Source, split: str) -> errors.UserError:
    """Builds the error for a split that contains unlabelled images."""
    return errors.UserError(
        f"Split {split!r} of {source.name} has images without a label; kNN and linear probes "
        "need labels. A folder needs one sub-folder per class."
    )


def check_outputs(trained: TrainedModel, outputs: Sequence[str], blocks: int = 1) -> None:
    """Checks that the network has the requested outputs.

    Raises:
      UserError: if an output is unknown, needs a head or hidden layer that the network lacks, or
        `blocks` exceeds the number of transformer blocks.
    """
    spec = trained.settings.student
    for output in outputs:
        if output not in OUTPUTS:
            raise errors.unknown("config.output", output, OUTPUTS)
        if output != "features" and spec.head == "none":
            raise errors.UserError(
                f"config.output={output!r}, but the checkpoint contains {spec.backbone} without a "
                "head. Set --config.output=features."
            )
        if output == "hidden" and (spec.head == "regression" or not spec.hidden):
            raise errors.UserError(
                f"config.output='hidden', but the head ({spec.head}, hidden={spec.hidden}) has no "
                "hidden layer. Set --config.output=features or embedding."
            )
    most = trained.encoder.backbone.readable_blocks
    if not 1 <= blocks <= most:
        allowed = f"1 to {most}" if most > 1 else "only 1, as it is not a ViT"
        raise errors.UserError(f"config.blocks={blocks}, but {spec.backbone} allows {allowed}.")
