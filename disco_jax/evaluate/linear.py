"""The linear probe: one linear layer on frozen features, through the same loop as pretraining."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict

from disco_jax.data.pipeline import to_devices
from disco_jax.errors import UserError
from disco_jax.evaluate.features import Features
from disco_jax.evaluate.scores import top_k
from disco_jax.ops.collectives import pmean
from disco_jax.train import loop, optimizer
from disco_jax.train.metrics import Logger
from disco_jax.train.state import everywhere
from disco_jax.train.step import parallel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProbeState:
    """A linear layer that is being trained.

    Attributes:
      step: i32[].
      params: {"kernel": f32[F, C], "bias": f32[C]}.
      opt_state: the optimizer's.
    """

    step: Array
    params: dict[str, Array]
    opt_state: Any


def train(
    config: ConfigDict, found: Features, num_classes: int, workdir: str | None = None
) -> dict[str, np.ndarray]:
    """Trains the layer on features extracted once.

    MoCo (arXiv:1911.05722, section 4.1) and DisCo: SGD with momentum, no weight decay, the rate
    divided by 10 at epochs 60 and 80 of 100; weights from N(0, 0.01), bias 0.

    Args:
      config: see `configs/linear.py`.
      found: of the training images.
      num_classes: C.
      workdir: where metrics go; None: nowhere.

    Returns:
      {"kernel": f32[F, C], "bias": f32[C]}.
    """
    batch_size = _batch_size(config, len(found.labels))
    steps_per_epoch = len(found.labels) // batch_size
    rate = optimizer.learning_rate(
        config.learning_rate, batch_size, steps_per_epoch, config.total_epochs
    )
    tx = optimizer.build(config.optimizer, rate)
    rng = np.random.default_rng(config.seed)
    dim = found.features.shape[1]
    params = {
        "kernel": rng.normal(0.0, 0.01, (dim, num_classes)).astype(np.float32),
        "bias": np.zeros(num_classes, np.float32),
    }
    start = ProbeState(np.int32(0), params, tx.init(params))
    state = loop.run(
        parallel(_make_step(tx)),
        everywhere(start),
        {},
        _batches(found, batch_size, config.seed),
        loop.Schedule(
            start=0,
            total=config.total_epochs * steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            batch_size=batch_size,
            log_steps=config.log_every_epochs * steps_per_epoch,
            verbose=False,
        ),
        Logger(workdir, tensorboard=False),
    )
    return jax.device_get(state.params)


def accuracy(params: dict[str, np.ndarray], found: Features) -> dict[str, float]:
    """{"top1", "top5"} in percent."""
    scores = found.features @ params["kernel"] + params["bias"]
    return {f"top{k}": top_k(scores, found.labels, k) for k in (1, 5)}


def _make_step(tx: optax.GradientTransformation):
    """The step of one replica; the loop's signature, nothing frozen."""

    def step(state: ProbeState, frozen: Any, batch: dict[str, Array]):
        def loss_fn(params):
            logits = batch["features"] @ params["kernel"] + params["bias"][None, :]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
            return jnp.mean(losses)

        loss, grads = pmean(jax.value_and_grad(loss_fn)(state.params))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return ProbeState(state.step + 1, params, opt_state), {"loss": loss}

    return step


def _batch_size(config: ConfigDict, count: int) -> int:
    """The configured batch, or the largest that a small set and the devices allow."""
    devices = jax.device_count()
    batch_size = min(config.batch_size, count) // devices * devices
    if not batch_size:
        raise UserError(f"{count} labelled images are fewer than the {devices} devices.")
    return batch_size


def _batches(found: Features, batch_size: int, seed: int) -> Iterator[tuple[Any, tuple[int, int]]]:
    """A fresh shuffle each epoch, the remainder dropped."""
    devices, epoch = jax.local_device_count(), 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(found.labels))
        for i in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[i : i + batch_size]
            tree = {"features": found.features[rows], "labels": found.labels[rows]}
            yield to_devices(tree, devices), (epoch, i + batch_size)
        epoch += 1
