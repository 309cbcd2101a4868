"""Linear probes for a grid of learning rates and weight decays, all trained in one pass."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict

from disco_jax.data import contract
from disco_jax.data.contract import Source
from disco_jax.data.subset import SubsetSource, read_labels
from disco_jax.errors import UserError
from disco_jax.evaluate import classifier, features, linear, online, scores, subsets
from disco_jax.evaluate.classifier import Classifier, ProbeState
from disco_jax.evaluate.features import TrainedModel
from disco_jax.ops.collectives import pmean
from disco_jax.run.metrics import Logger


def train(
    config: ConfigDict, rows: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[Classifier, dict[str, Any]]:
    """Trains one classifier per learning rate and weight decay in parallel and selects the best.

    All classifiers have the same initial weights and read the same batches. The selected pair has
    the highest top-1 on held-out training images (ties: the first); test images are not used. A
    classifier with that pair is then trained again, on all training images.

    Args:
      config: see `probes.classification`; `grid` has the learning rates (for a batch of 256, in
        place of `learning_rate.base_lr`), the weight decays and the held-out percentage.
      rows: f32[N, F], features of the training images.
      labels: i32[N].
      num_classes: C.

    Returns:
      The classifier, and {"rate", "weight_decay", "held_out_top1", "grid": [{...} per pair]}.

    Raises:
      UserError: if the grid is empty, or no image can be held out.
    """
    pairs = _pairs(config)
    held_out = subsets.held_out(labels, config.grid.held_out_percent, config.seed)
    feature_stats = classifier.feature_stats(rows[~held_out]) if config.normalise else {}
    classifiers = side_by_side(
        config, rows[~held_out], labels[~held_out], num_classes, pairs, feature_stats
    )
    best_config, result = _select(
        config, classifiers, pairs, rows[held_out], labels[held_out], feature_stats
    )
    best_config.evaluate_every_epochs = 0
    layer, _ = linear.train(best_config, rows, labels, num_classes)
    return layer, result


def train_online(
    config: ConfigDict,
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
      config: see `train`.
      trained: the frozen network; its config defines how images are read.
      source: labelled images; the held-out ones are kept in memory, encoded as they are stored.
      folder: see `online.train`.
      eval_fn: see `online.train`; applied to the training of the selected pair.
      eval_every_steps: see `online.train`.

    Returns:
      See `train`.

    Raises:
      UserError: see `train` and `online.train`.
    """
    pairs, split = _pairs(config), trained.config.data.train_split
    labels = read_labels(source, split)
    held_out = subsets.held_out(labels, config.grid.held_out_percent, config.seed)
    feature_stats = online.feature_stats_of(config, trained, source)
    unit_config = _with_unit_rate(config)
    step, start = _parallel_step(
        unit_config,
        online.plan(unit_config, trained, source),
        pairs,
        (online.width(config, trained), features.classes(source, split)),
        online.rows_of(config, trained),
    )
    state = online.fit(
        unit_config,
        trained,
        Marked(source, split, held_out),
        folder and f"{folder}_search",
        step,
        start,
        {"feature_stats": feature_stats, "network": trained.variables},
    )
    encoded = _encode_rows(config, trained, source, np.flatnonzero(held_out))
    classifiers = _heads(state)
    best_config, result = _select(
        config, classifiers, pairs, getattr(encoded, config.output), encoded.labels, feature_stats
    )
    _, layer = online.train(
        best_config, trained, source, folder, eval_fn=eval_fn, eval_every_steps=eval_every_steps
    )
    return layer, result


def _encode_rows(
    config: ConfigDict, trained: TrainedModel, source: Source, rows: np.ndarray
) -> features.Features:
    """Encodes some images of the training split, i64[N] by number, without augmentation."""
    split = trained.config.data.train_split
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    chosen = SubsetSource(source, split, rows, **hosts)
    return features.of_split(
        trained, chosen, split, config.extract_batch_size, (config.output,), config.blocks
    )


class Marked:
    """Source whose training batches mark held-out images."""

    def __init__(self, source: Source, split: str, held_out: np.ndarray):
        """Wraps `source`; rows with a true `held_out`, bool[N], of `split` are held out."""
        self._source, self._split, self._held_out = source, split, held_out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def train(self, split: str, *args: Any) -> contract.Batches:
        """Yields the batches of `Source.train`; `aux["learned"]` is f32[b], 0 if held out."""
        assert split == self._split
        for batch in self._source.train(split, *args):
            learned = (~self._held_out[batch.rows]).astype(np.float32)
            yield batch._replace(aux={**batch.aux, "learned": learned})


def _select(
    config: ConfigDict,
    classifiers: list[tuple[np.ndarray, np.ndarray]],
    pairs: list[tuple[float, float]],
    rows: np.ndarray,
    labels: np.ndarray,
    feature_stats: Mapping[str, np.ndarray],
) -> tuple[ConfigDict, dict[str, Any]]:
    """Returns the config with the pair of highest held-out top-1, and the results of all pairs."""
    top1s = [
        scores.top_k(Classifier(*head, feature_stats).scores(rows), labels, 1)
        for head in classifiers
    ]
    best = int(np.argmax(top1s))
    best_config = config.copy_and_resolve_references()
    best_config.learning_rate.base_lr, best_config.optimizer.weight_decay = pairs[best]
    table = [
        {"rate": rate, "weight_decay": decay, "held_out_top1": top}
        for (rate, decay), top in zip(pairs, top1s, strict=True)
    ]
    return best_config, {**table[best], "grid": table}


def _with_unit_rate(config: ConfigDict) -> ConfigDict:
    """Returns the config with learning rate 1, which each pair's rate multiplies."""
    unit_config = config.copy_and_resolve_references()
    unit_config.learning_rate.base_lr = 1.0
    return unit_config


def _pairs(config: ConfigDict) -> list[tuple[float, float]]:
    if not config.grid.weight_decays or min(config.grid.rates) <= 0:
        raise UserError(
            f"config.grid.rates={config.grid.rates} and config.grid.weight_decays="
            f"{config.grid.weight_decays}: rates must be positive, with at least one weight decay."
        )
    if config.optimizer.name != "sgd":
        raise UserError(
            f"config.grid trains with sgd, not {config.optimizer.name!r}: set "
            "config.optimizer.name=sgd."
        )
    return list(itertools.product(config.grid.rates, config.grid.weight_decays))


def side_by_side(
    config: ConfigDict,
    rows: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    pairs: list[tuple[float, float]],
    feature_stats: dict[str, np.ndarray],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Trains a classifier per pair in one pass; returns (kernel f32[F, C], bias f32[C]) of each."""
    unit_config = _with_unit_rate(config)
    probe_plan = linear.plan(unit_config, len(labels))
    step, start = _parallel_step(
        unit_config,
        probe_plan,
        pairs,
        (rows.shape[1], num_classes),
        lambda _, __, batch: batch["features"],
    )
    batches = linear.batches([rows], labels, probe_plan.batch_size, config.seed)
    logger = Logger(None, tensorboard=False)
    return _heads(
        linear.fit(
            unit_config, probe_plan, step, start, {"feature_stats": feature_stats}, batches, logger
        )
    )


def _parallel_step(
    config: ConfigDict,
    probe_plan: linear.Plan,
    pairs: list[tuple[float, float]],
    shape: tuple[int, int],
    read: Callable[..., Array],
) -> tuple[Any, ProbeState]:
    """Returns the training step of all classifiers in parallel, and its initial state.

    Args:
      config: see `train`.
      probe_plan: provides the learning rate schedule.
      pairs: learning rate and weight decay of each classifier.
      shape: (F, C) of a classifier.
      read: (state, frozen, batch) -> f32[B, F].
    """
    rates, decays = (jnp.asarray(x, jnp.float32) for x in zip(*pairs, strict=True))
    head = classifier.init(config.init, *shape, config.seed)
    stacked = jax.tree.map(lambda x: np.broadcast_to(x, (len(pairs), *x.shape)), head)
    tx = optax.trace(config.optimizer.momentum, nesterov=config.optimizer.nesterov)

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
