"""Many linear probes at once: a grid of learning rates and weight decays in one pass."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict

from disco_jax.data import base
from disco_jax.data.base import Source
from disco_jax.data.subset import SubsetSource, read_labels
from disco_jax.errors import UserError
from disco_jax.evaluate import classifier, features, linear, scores, streamed, subsets
from disco_jax.evaluate.classifier import Classifier, ProbeState
from disco_jax.evaluate.features import Trained
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
    again, found = _choose(config, heads, pairs, rows[out], labels[out], standard)
    again.evaluate_every_epochs = 0
    layer, _ = linear.train(again, rows, labels, num_classes)
    return layer, found


def train_streamed(
    config: ConfigDict,
    trained: Trained,
    source: Source,
    folder: str | None,
    *,
    look: streamed.Look | None = None,
    look_steps: int = 0,
) -> tuple[Classifier, dict[str, Any]]:
    """`train` on random crops and flips, read and encoded anew in every epoch.

    What is held out is read with the others and weighs nothing. Metrics and checkpoints of the
    search are in `folder`_search, those of the layer that it finds in `folder`.

    Args:
      config: see `train`.
      trained: the frozen network; its config says how images are read.
      source: labelled images; the held-out ones are kept in memory, encoded as they are stored.
      folder: see `streamed.train`.
      look: see `streamed.train`; at the layer that was found.
      look_steps: likewise.

    Returns:
      As `train` does.

    Raises:
      UserError: see `train` and `streamed.train`.
    """
    pairs, split = _pairs(config), trained.config.data.train_split
    labels = read_labels(source, split)
    out = subsets.held_out(labels, config.grid.held_out_percent, config.seed)
    standard = streamed.standard_of(config, trained, source)
    unit = _unit(config)
    step, start = _many(
        unit,
        streamed.plan(unit, trained, source),
        pairs,
        (streamed.width(config, trained), features.classes(source, split)),
        streamed.rows_of(config, trained),
    )
    state = streamed.fit(
        unit,
        trained,
        Marked(source, split, out),
        folder and f"{folder}_search",
        step,
        start,
        {"standard": standard, "network": trained.variables},
    )
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    few = SubsetSource(source, split, np.flatnonzero(out), **hosts)
    found = features.of_split(
        trained, few, split, config.extract_batch_size, (config.output,), config.blocks
    )
    heads = _heads(state)
    again, result = _choose(
        config, heads, pairs, getattr(found, config.output), found.labels, standard
    )
    _, layer = streamed.train(again, trained, source, folder, look=look, look_steps=look_steps)
    return layer, result


class Marked:
    """A source whose training batches say of each image whether it is to be learned from."""

    def __init__(self, source: Source, split: str, out: np.ndarray):
        """Marks the rows bool[N] `out` of `split` with 0, the others with 1."""
        self._source, self._split, self._out = source, split, out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def train(self, split: str, *args: Any) -> base.Batches:
        """See `base.Source`; `aux` has "learned", f32[b]."""
        assert split == self._split
        for batch in self._source.train(split, *args):
            learned = (~self._out[batch.rows]).astype(np.float32)
            yield batch._replace(aux={**batch.aux, "learned": learned})


def _choose(
    config: ConfigDict,
    heads: list[tuple[np.ndarray, np.ndarray]],
    pairs: list[tuple[float, float]],
    rows: np.ndarray,
    labels: np.ndarray,
    standard: Mapping[str, np.ndarray],
) -> tuple[ConfigDict, dict[str, Any]]:
    """The config with the pair that is right most often on held-out rows, and the results."""
    tops = [scores.top_k(Classifier(*head, standard).scores(rows), labels, 1) for head in heads]
    best = int(np.argmax(tops))
    again = config.copy_and_resolve_references()
    again.learning_rate.per_256, again.optimizer.weight_decay = pairs[best]
    table = [
        {"rate": rate, "weight_decay": decay, "held_out_top1": top}
        for (rate, decay), top in zip(pairs, tops, strict=True)
    ]
    return again, {**table[best], "grid": table}


def _unit(config: ConfigDict) -> ConfigDict:
    """The config with the rate 1, which each pair's own is multiplied with."""
    unit = config.copy_and_resolve_references()
    unit.learning_rate.per_256 = 1.0
    return unit


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
    unit = _unit(config)
    how = linear.plan(unit, len(labels))
    step, start = _many(
        unit, how, pairs, (rows.shape[1], num_classes), lambda _, __, batch: batch["features"]
    )
    batches = linear.batches([rows], labels, how.batch_size, config.seed)
    logger = Logger(None, tensorboard=False)
    return _heads(linear.fit(unit, how, step, start, {"standard": standard}, batches, logger))


def _many(
    config: ConfigDict,
    how: linear.Plan,
    pairs: list[tuple[float, float]],
    shape: tuple[int, int],
    read: Callable[..., Array],
) -> tuple[Any, ProbeState]:
    """The step of all layers side by side, and the state that it begins with.

    Args:
      config: see `train`.
      how: for the schedule.
      pairs: of rate and weight decay.
      shape: (F, C) of a layer.
      read: (state, frozen, batch) -> f32[B, F].
    """
    rates, decays = (jnp.asarray(x, jnp.float32) for x in zip(*pairs, strict=True))
    head = classifier.init(config.init, *shape, config.seed)
    many = jax.tree.map(lambda x: np.broadcast_to(x, (len(pairs), *x.shape)), head)
    tx = optax.trace(config.optimizer.momentum, nesterov=config.optimizer.nesterov)

    def total(params, rows, batch, standard):
        """Sums, so that the parts of a batch weigh as much as they have images to learn from."""
        found = classifier.logits(params, rows, standard)
        losses = optax.softmax_cross_entropy_with_integer_labels(found, batch["labels"])
        return jnp.sum(losses * batch.get("learned", 1.0))

    def step(state, frozen, batch):
        rows = read(state, frozen, batch)
        values, grads = jax.vmap(jax.value_and_grad(total), in_axes=(0, None, None, None))(
            state.params["classifier"], rows, batch, frozen["standard"]
        )
        count = jnp.sum(batch.get("learned", jnp.ones(len(rows))))
        values, grads, count = pmean((values, grads, count))
        count = jnp.maximum(count, 1e-6)  # where all of a batch is held out
        params = state.params["classifier"]
        grads = jax.tree.map(lambda g, p: g / count + _wide(decays, p) * p, grads, params)
        updates, opt_state = tx.update(grads, state.opt_state)
        rate = how.rate(state.step)
        params = jax.tree.map(lambda p, u: p - rate * _wide(rates, p) * u, params, updates)
        # A rate that is too high may end in numbers that are none: it is not chosen, that is all.
        finite = jnp.where(jnp.isfinite(values), values, jnp.inf)
        metrics = {"loss": jnp.min(finite) / count}
        return ProbeState(state.step + 1, {"classifier": params}, {}, opt_state), metrics

    start = ProbeState(
        jnp.zeros((), jnp.int32), {"classifier": many}, {}, jax.device_get(tx.init(many))
    )
    return step, start


def _heads(state: ProbeState) -> list[tuple[np.ndarray, np.ndarray]]:
    """(kernel f32[F, C], bias f32[C]) of every pair."""
    made = jax.device_get(state.params["classifier"])
    return [
        (np.nan_to_num(kernel), np.nan_to_num(bias))
        for kernel, bias in zip(made["kernel"], made["bias"], strict=True)
    ]


def _wide(values, like):
    """f32[G] with further axes of length 1, to meet [G, ...]."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))
