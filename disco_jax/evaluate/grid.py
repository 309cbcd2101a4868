"""Linear probes for a grid of learning rates and weight decays, all trained in one pass."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from disco_jax.data.contract import Source
from disco_jax.data.subset import read_labels
from disco_jax.errors import UserError
from disco_jax.evaluate import (
    classifier,
    features,
    held_out,
    linear,
    online,
    scores,
    subsets,
)
from disco_jax.evaluate.classifier import Classifier, ProbeState
from disco_jax.evaluate.features import TrainedModel
from disco_jax.evaluate.probe_settings import ProbeSettings
from disco_jax.ops.collectives import pmean
from disco_jax.run.metrics import Logger


def train(
    settings: ProbeSettings, rows: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[Classifier, dict[str, Any]]:
    """Trains one classifier per learning rate and weight decay in parallel and selects the best.

    All classifiers have the same initial weights and read the same batches. The selected pair has
    the highest top-1 on held-out training images (ties: the first); test images are not used. With
    `grid.folds`, each of so many parts of the training images is held out once, and the mean top-1
    counts. A classifier with that pair is then trained again, on all training images.

    Args:
      settings: of the training; `grid` has the learning rates (for a batch of 256, in
        place of `learning_rate.base_lr`), the weight decays and the held-out percentage.
      rows: f32[N, F], features of the training images.
      labels: i32[N].
      num_classes: C.

    Returns:
      The classifier, and {"rate", "weight_decay", "held_out_top1", "grid": [{...} per pair]}.

    Raises:
      UserError: if the grid is empty, or no image can be held out.
    """
    pairs = _pairs(settings)
    masks = _held_out_masks(settings, labels)
    top1s = [_held_out_top1s(settings, rows, labels, num_classes, pairs, mask) for mask in masks]
    best_settings, result = _select(settings, pairs, np.mean(top1s, axis=0).tolist())
    best_settings = dataclasses.replace(best_settings, evaluate_every_epochs=0)
    layer, _ = linear.train(best_settings, rows, labels, num_classes)
    return layer, result


def train_online(
    settings: ProbeSettings,
    trained: TrainedModel,
    source: Source,
    folder: str | None,
    *,
    eval_fn: online.EvalFn | None = None,
    eval_every_steps: int = 0,
) -> tuple[Classifier, dict[str, Any]]:
    """Runs `train` on random crops and flips that are read and encoded again in every epoch.

    Held-out images are read with the others but have weight 0. The search writes metrics and
    checkpoints to `folder`_search, the training of the selected pair to `folder`.

    Args:
      settings: see `train`.
      trained: the frozen network; its settings define how images are read.
      source: labelled images; the held-out ones are kept in memory, encoded as they are stored.
      folder: see `online.train`.
      eval_fn: see `online.train`; applied to the training of the selected pair.
      eval_every_steps: see `online.train`.

    Returns:
      See `train`.

    Raises:
      UserError: see `train` and `online.train`.
    """
    pairs, split = _pairs(settings), trained.settings.data.train_split
    labels = read_labels(source, split)
    mask = subsets.held_out(labels, settings.grid.held_out_percent, settings.seed)
    feature_stats = online.feature_stats_of(settings, trained, source)
    unit_settings = settings.with_rate(1.0)  # which each pair's rate multiplies
    step, start = _parallel_step(
        unit_settings,
        online.plan(unit_settings, trained, source),
        pairs,
        (online.width(settings, trained), features.classes(source, split)),
        online.rows_of(settings, trained),
    )
    state = online.fit(
        unit_settings,
        trained,
        held_out.Marked(source, split, mask),
        folder and f"{folder}_search",
        step,
        start,
        {"feature_stats": feature_stats, "network": trained.variables},
    )
    few = held_out.subset(source, split, mask)
    encoded = features.of_split(
        trained, few, split, settings.extract_batch_size, (settings.output,), settings.blocks
    )
    top1s = _top1s(_heads(state), getattr(encoded, settings.output), encoded.labels, feature_stats)
    best_settings, result = _select(settings, pairs, top1s)
    _, layer = online.train(
        best_settings, trained, source, folder, eval_fn=eval_fn, eval_every_steps=eval_every_steps
    )
    return layer, result


def _held_out_masks(settings: ProbeSettings, labels: np.ndarray) -> list[np.ndarray]:
    """Returns a mask bool[N] of held-out rows; one for each fold of a cross-validation."""
    if not settings.grid.folds:
        return [subsets.held_out(labels, settings.grid.held_out_percent, settings.seed)]
    parts = subsets.folds(labels, settings.grid.folds, settings.seed)
    return [parts == part for part in range(settings.grid.folds)]


def _held_out_top1s(
    settings: ProbeSettings,
    rows: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    pairs: list[tuple[float, float]],
    mask: np.ndarray,
) -> list[float]:
    """Trains a classifier per pair on rows without a `mask`; returns the top-1 on the others."""
    feature_stats = classifier.feature_stats(rows[~mask]) if settings.normalise else {}
    classifiers = side_by_side(
        settings, rows[~mask], labels[~mask], num_classes, pairs, feature_stats
    )
    return _top1s(classifiers, rows[mask], labels[mask], feature_stats)


def _top1s(
    classifiers: list[tuple[np.ndarray, np.ndarray]],
    rows: np.ndarray,
    labels: np.ndarray,
    feature_stats: Mapping[str, np.ndarray],
) -> list[float]:
    """Returns the top-1 of each classifier in percent."""
    return [
        scores.top_k(Classifier(*head, feature_stats).scores(rows), labels, 1)
        for head in classifiers
    ]


def _select(
    settings: ProbeSettings, pairs: list[tuple[float, float]], top1s: list[float]
) -> tuple[ProbeSettings, dict[str, Any]]:
    """Returns the settings with the best pair on held-out images, and the results of all pairs."""
    best = int(np.argmax(top1s))
    rate, decay = pairs[best]
    table = [
        {"rate": rate, "weight_decay": decay, "held_out_top1": top}
        for (rate, decay), top in zip(pairs, top1s, strict=True)
    ]
    best_settings = settings.with_rate(rate).with_weight_decay(decay)
    return best_settings, {**table[best], "grid": table}


def _pairs(settings: ProbeSettings) -> list[tuple[float, float]]:
    if not settings.grid.weight_decays or min(settings.grid.rates) <= 0:
        raise UserError(
            f"config.grid.rates={settings.grid.rates} and config.grid.weight_decays="
            f"{settings.grid.weight_decays}: rates must be positive, with at least one weight "
            "decay."
        )
    if settings.optimizer.name != "sgd":
        raise UserError(
            f"config.grid trains with sgd, not {settings.optimizer.name!r}: set "
            "config.optimizer.name=sgd."
        )
    return list(itertools.product(settings.grid.rates, settings.grid.weight_decays))


def side_by_side(
    settings: ProbeSettings,
    rows: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    pairs: list[tuple[float, float]],
    feature_stats: dict[str, np.ndarray],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Trains a classifier per pair in one pass; returns (kernel f32[F, C], bias f32[C]) of each."""
    unit_settings = settings.with_rate(1.0)  # which each pair's rate multiplies
    probe_plan = linear.plan(unit_settings, len(labels))
    step, start = _parallel_step(
        unit_settings,
        probe_plan,
        pairs,
        (rows.shape[1], num_classes),
        lambda _, __, batch: batch["features"],
    )
    batches = linear.batches([rows], labels, probe_plan.batch_size, settings.seed)
    logger = Logger(None, tensorboard=False)
    return _heads(
        linear.fit(
            unit_settings,
            probe_plan,
            step,
            start,
            {"feature_stats": feature_stats},
            batches,
            logger,
        )
    )


def _parallel_step(
    settings: ProbeSettings,
    probe_plan: linear.Plan,
    pairs: list[tuple[float, float]],
    shape: tuple[int, int],
    read: Callable[..., Array],
) -> tuple[Any, ProbeState]:
    """Returns the training step of all classifiers in parallel, and its initial state.

    Args:
      settings: see `train`.
      probe_plan: provides the learning rate schedule.
      pairs: learning rate and weight decay of each classifier.
      shape: (F, C) of a classifier.
      read: (state, frozen, batch) -> f32[B, F].
    """
    rates, decays = (jnp.asarray(x, jnp.float32) for x in zip(*pairs, strict=True))
    head = classifier.init(settings.init, *shape, settings.seed)
    stacked = jax.tree.map(lambda x: np.broadcast_to(x, (len(pairs), *x.shape)), head)
    tx = optax.trace(settings.optimizer.momentum, nesterov=settings.optimizer.nesterov)

    def summed_loss(params, rows, batch, feature_stats):
        """Sums losses, so that shards count in proportion to their images that are not held out."""
        logits = classifier.logits(params, rows, feature_stats)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return jnp.sum(losses * batch.get("learned", 1.0))

    def step(state, frozen, batch):
        rows = read(state, frozen, batch)
        values, grads = jax.vmap(jax.value_and_grad(summed_loss), in_axes=(0, None, None, None))(
            state.params["classifier"], rows, batch, frozen["feature_stats"]
        )
        count = jnp.sum(batch.get("learned", jnp.ones(len(rows))))
        values, grads, count = pmean((values, grads, count))
        count = jnp.maximum(count, 1e-6)  # all images of a batch may be held out
        params = state.params["classifier"]
        grads = jax.tree.map(lambda g, p: g / count + _broadcast(decays, p) * p, grads, params)
        updates, opt_state = tx.update(grads, state.opt_state)
        rate = probe_plan.rate(state.step)
        params = jax.tree.map(lambda p, u: p - rate * _broadcast(rates, p) * u, params, updates)
        # A learning rate that is too high may diverge; its classifier is just never selected.
        finite = jnp.where(jnp.isfinite(values), values, jnp.inf)
        metrics = {"loss": jnp.min(finite) / count}
        return ProbeState(state.step + 1, {"classifier": params}, {}, opt_state), metrics

    start = ProbeState(
        jnp.zeros((), jnp.int32), {"classifier": stacked}, {}, jax.device_get(tx.init(stacked))
    )
    return step, start


def _heads(state: ProbeState) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (kernel f32[F, C], bias f32[C]) of every pair, with NaNs replaced by 0."""
    params = jax.device_get(state.params["classifier"])
    return [
        (np.nan_to_num(kernel), np.nan_to_num(bias))
        for kernel, bias in zip(params["kernel"], params["bias"], strict=True)
    ]


def _broadcast(values, like):
    """Reshapes f32[G] so that it broadcasts against [G, ...]."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))
