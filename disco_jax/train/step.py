"""The train step, written for one replica, and its `pmap`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

from disco_jax.methods.base import Method, Record, Term
from disco_jax.models.encoder import Variables, encode
from disco_jax.ops.collectives import AXIS, pmean, positions
from disco_jax.ops.schedules import Schedule
from disco_jax.train.state import TrainState

Metrics = dict[str, Array]
Step = Callable[[TrainState, Mapping[str, Variables], Any], tuple[TrainState, Metrics]]


class Photometric(Protocol):
    """What the step asks of a recipe: crops u8[B, H, W, 3] to images f32[B, H, W, 3], a view."""

    def photometric(
        self, views: Mapping[int, Array], key: Array, positions: Array
    ) -> Mapping[int, Array]: ...


def make_train_step(
    method: Method,
    recipe: Photometric,
    tx: optax.GradientTransformation,
    *,
    learning_rate: Schedule,
    ema_rate: Schedule,
    seed: int,
) -> Step:
    """The step of one replica: (state, frozen, batch) -> (state, metrics).

    The order is that of the official MoCo and DisCo: the momentum network follows the student as
    it is before this step's update, then encodes the keys; the losses read the queues before the
    keys enter them; the optimizer comes last.

    Args:
      method: networks and objectives.
      recipe: makes normalised images of crops.
      tx: the optimizer.
      learning_rate: only for the metrics; `tx` has its own.
      ema_rate: step -> the share of the old momentum weights that is kept.
      seed: of augmentation, shuffling and the student's dropout; folded with the step and an
        image's global position, so that a replay draws the same on any number of devices.

    Returns:
      The step. `frozen` maps "teacher" to its variables; `batch` holds "views" and "aux".
    """
    networks, plan = method.networks, method.plan

    def train_step(state: TrainState, frozen: Mapping[str, Variables], batch: Any):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        augment_rng, shuffle_rng = jax.random.split(rng)
        size = next(iter(batch["views"].values())).shape[0]
        views = recipe.photometric(batch["views"], augment_rng, positions(size))
        rate = ema_rate(state.step)
        momentum = follow(state.momentum, state.student, rate)
        targets, stats = {}, {}
        for name, variables in {"momentum": momentum, **frozen}.items():
            if name in plan:
                encoded = encode(networks[name], variables, views, plan[name], shuffle_rng)
                targets[name], stats[name] = jax.lax.stop_gradient(encoded)
        stats.pop("teacher", None)  # frozen: its stored statistics stay what they are

        def loss_fn(params):
            variables = {**state.student, "params": params}
            student, new = encode(
                networks["student"], variables, views, plan["student"], shuffle_rng, dropout=True
            )
            record = Record({"student": student, **targets}, batch["aux"])
            terms = {
                name: objective(record, state.memory[name], state.step)
                for name, objective in method.objectives.items()
            }
            return method.total(terms), (terms, new)

        params = state.student["params"]
        (loss, (terms, new)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        stats["student"] = new
        grads, stats, metrics = pmean((grads, stats, _report(loss, terms)))
        updates, opt_state = tx.update(grads, state.opt_state, params)
        student = {"params": optax.apply_updates(params, updates), "batch_stats": stats["student"]}
        if momentum:
            momentum = {**momentum, "batch_stats": stats["momentum"]}
            metrics["ema_rate"] = rate
        metrics["learning_rate"] = learning_rate(state.step)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        memory = {name: term.memory for name, term in terms.items()}
        return TrainState(state.step + 1, student, momentum, memory, opt_state), metrics

    return train_step


def follow(momentum: Variables, student: Variables, rate: Array) -> Variables:
    """The EMA of the student's parameters: rate * old + (1 - rate) * student; {} stays {}.

    MoCo (arXiv:1911.05722) eq. 2. BatchNorm statistics are the momentum network's own.
    """
    if not momentum:
        return momentum
    params = jax.tree.map(
        lambda old, new: rate * old + (1 - rate) * new, momentum["params"], student["params"]
    )
    return {**momentum, "params": params}


def parallel(train_step: Step, devices: Sequence[jax.Device] | None = None) -> Step:
    """`train_step` on every device: the batch is split, all else is equal on all of them.

    Args:
      train_step: of one replica.
      devices: which; None: all of all hosts.
    """
    return jax.pmap(
        train_step,
        AXIS,
        in_axes=(None, None, 0),
        out_axes=None,
        donate_argnums=0,
        devices=devices,
    )


def _report(loss: Array, terms: Mapping[str, Term]) -> Metrics:
    """{"loss", "contrast/loss", "contrast/accuracy", ...}."""
    metrics = {"loss": loss}
    for name, term in terms.items():
        metrics[f"{name}/loss"] = term.loss
        metrics |= {f"{name}/{key}": value for key, value in term.metrics.items()}
    return jax.tree.map(lambda value: value.astype(jnp.float32), metrics)
