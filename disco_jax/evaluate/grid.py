"""Many linear probes at once: a grid of learning rates and weight decays in one pass."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from disco_jax.errors import UserError
from disco_jax.evaluate import classifier, linear, scores, subsets
from disco_jax.evaluate.classifier import Classifier, ProbeState
from disco_jax.ops.collectives import pmean
from disco_jax.train.metrics import Logger


def train(
    config: ConfigDict, rows: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[Classifier, dict[str, Any]]:
    """Trains a layer for every rate and weight decay side by side, and keeps the best.

    All start alike and read the same batches. The best is the one that is right most often on a
    part of the training images that none of them has learned from (ties: the first); the test
    images play no part in it. It is then trained once more, on all of them.

    Args:
      config: see `common.classification`; `grid` has the rates (for a batch of 256, instead of
        `learning_rate.per_256`), the weight decays, and how much is held out.
      rows: f32[N, F] of the training images.
      labels: i32[N].
      num_classes: C.

    Returns:
      The layer, and {"rate", "weight_decay", "held_out_top1", "grid": [{...} for each]}.

    Raises:
      UserError: an empty grid, or nothing that can be held out.
    """
    pairs = _pairs(config)
    out = subsets.held_out(labels, config.grid.held_out_percent, config.seed)
    standard = classifier.standard(rows[~out]) if config.normalise else {}
    heads = side_by_side(config, rows[~out], labels[~out], num_classes, pairs, standard)
    tops = [
        scores.top_k(Classifier(*head, standard).scores(rows[out]), labels[out], 1)
        for head in heads
    ]
    best = int(np.argmax(tops))
    rate, decay = pairs[best]
    again = config.copy_and_resolve_references()
    again.learning_rate.per_256, again.optimizer.weight_decay = rate, decay
    again.evaluate_every_epochs = 0
    layer, _ = linear.train(again, rows, labels, num_classes)
    table = [
        {"rate": rate, "weight_decay": decay, "held_out_top1": top}
        for (rate, decay), top in zip(pairs, tops, strict=True)
    ]
    return layer, {**table[best], "grid": table}


def _pairs(config: ConfigDict) -> list[tuple[float, float]]:
    if not config.grid.weight_decays or min(config.grid.rates) <= 0:
        raise UserError(
            f"config.grid.rates={config.grid.rates} and config.grid.weight_decays="
            f"{config.grid.weight_decays}: give rates above 0, and one weight decay at least."
        )
    if config.optimizer.name != "sgd":
        raise UserError(f"config.grid trains with sgd, not {config.optimizer.name!r}.")
    return list(itertools.product(config.grid.rates, config.grid.weight_decays))


def side_by_side(
    config: ConfigDict,
    rows: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    pairs: list[tuple[float, float]],
    standard: dict[str, np.ndarray],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(kernel f32[F, C], bias f32[C]) of every (rate, weight decay), trained in one pass."""
    unit = config.copy_and_resolve_references()
    unit.learning_rate.per_256 = 1.0
    how = linear.plan(unit, len(labels))
    rates, decays = (jnp.asarray(x, jnp.float32) for x in zip(*pairs, strict=True))
    head = classifier.init(config.init, rows.shape[1], num_classes, config.seed)
    many = jax.tree.map(lambda x: np.broadcast_to(x, (len(pairs), *x.shape)), head)
    tx = optax.trace(config.optimizer.momentum, nesterov=config.optimizer.nesterov)

    def losses(params, batch, standard):
        found = classifier.logits(params, batch["features"], standard)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(found, batch["labels"]))

    def step(state, frozen, batch):
        values, grads = jax.vmap(jax.value_and_grad(losses), in_axes=(0, None, None))(
            state.params["classifier"], batch, frozen["standard"]
        )
        values, grads = pmean((values, grads))
        params = state.params["classifier"]
        grads = jax.tree.map(lambda g, p: g + _wide(decays, p) * p, grads, params)
        updates, opt_state = tx.update(grads, state.opt_state)
        rate = how.rate(state.step)
        params = jax.tree.map(lambda p, u: p - rate * _wide(rates, p) * u, params, updates)
        # A rate that is too high may end in numbers that are none: it is not chosen, that is all.
        finite = jnp.where(jnp.isfinite(values), values, jnp.inf)
        metrics = {"loss": jnp.min(finite)}
        return ProbeState(state.step + 1, {"classifier": params}, {}, opt_state), metrics

    start = ProbeState(np.int32(0), {"classifier": many}, {}, jax.device_get(tx.init(many)))
    batches = linear.batches([rows], labels, how.batch_size, config.seed)
    logger = Logger(None, tensorboard=False)
    state = linear.fit(unit, how, step, start, {"standard": standard}, batches, logger)
    made = jax.device_get(state.params["classifier"])
    return [
        (np.nan_to_num(kernel), np.nan_to_num(bias))
        for kernel, bias in zip(made["kernel"], made["bias"], strict=True)
    ]


def _wide(values, like):
    """f32[G] with further axes of length 1, to meet [G, ...]."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))
