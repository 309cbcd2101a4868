"""The train step, written for one replica, and its `pmap`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

from disco_jax.methods.base import Method, Record, Term
from disco_jax.models.encoder import Network, Variables, encode
from disco_jax.ops.collectives import AXIS, pmean, positions
from disco_jax.ops.schedules import Schedule
from disco_jax.train import health, optimizer
from disco_jax.train.state import TrainState

# Keys of views below this are augmentation's.
_MIXING = 1 << 16
Metrics = dict[str, Array]
Step = Callable[[TrainState, Mapping[str, Variables], Any], tuple[TrainState, Metrics]]


class Photometric(Protocol):
    """What the step asks of a recipe: crops u8[B, H, W, 3] to images f32[B, H, W, 3], a view."""

    def photometric(
        self, views: Mapping[int, Array], key: Array, positions: Array
    ) -> Mapping[int, Array]: ...


class Built(NamedTuple):
    """A step and what it was made with.

    Attributes:
      train_step: of one replica.
      tx: the optimizer, whose state is in the step's.
      learning_rate: step -> the rate.
    """

    train_step: Step
    tx: optax.GradientTransformation
    learning_rate: Schedule


def from_config(config: Any, method: Method, recipe: Photometric, steps_per_epoch: int) -> Built:
    """The step of a pretraining config; see `make_train_step`.

    Args:
      config: see `configs/common.py`, resolved.
      method: what `methods.build` made of it.
      recipe: what `views.build` did.
      steps_per_epoch: for the schedules.

    Raises:
      UserError: a setting of the optimizer or the schedules will not do.
    """
    epochs = config.total_epochs
    rate = optimizer.learning_rate(config.learning_rate, config.batch_size, steps_per_epoch, epochs)
    tx = optimizer.build(config.optimizer, rate, steps_per_epoch, epochs)
    train_step = make_train_step(
        method,
        recipe,
        tx,
        learning_rate=rate,
        ema_rate=optimizer.ema_rate(config.momentum, steps_per_epoch * epochs),
        seed=config.seed,
        follow_last=config.momentum.follow == "after",
        health_steps=config.log.every_steps,
    )
    return Built(train_step, tx, rate)


def make_train_step(
    method: Method,
    recipe: Photometric,
    tx: optax.GradientTransformation,
    *,
    learning_rate: Schedule,
    ema_rate: Schedule,
    seed: int,
    follow_last: bool = False,
    health_steps: int = 1,
) -> Step:
    """The step of one replica: (state, frozen, batch) -> (state, metrics).

    The order is that of the official MoCo and DisCo: the momentum network follows the student as
    it is before this step's update, then encodes the keys; the losses read the queues before the
    keys enter them; the optimizer comes last. In DINO (`follow_last`) the momentum network follows
    after the optimizer.

    Args:
      method: networks and objectives.
      recipe: makes normalised images of crops.
      tx: the optimizer.
      learning_rate: only for the metrics; `tx` has its own.
      ema_rate: step -> the share of the old momentum weights that is kept.
      seed: of augmentation, shuffling and the student's dropout; folded with the step and an
        image's global position, so that a replay draws the same on any number of devices.
      follow_last: the momentum network follows the updated student, at the end of the step.
      health_steps: signals of health are measured every so many steps; see `health.measured`.

    Returns:
      The step. `frozen` maps "teacher" to its variables; `batch` holds "views" and "aux".
    """

    def train_step(state: TrainState, frozen: Mapping[str, Variables], batch: Any):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        augment_rng, shuffle_rng = jax.random.split(rng)
        size = next(iter(batch["views"].values())).shape[0]
        views = recipe.photometric(batch["views"], augment_rng, positions(size))
        views, aux = method.mix(views, batch["aux"], jax.random.fold_in(augment_rng, _MIXING))
        rate = ema_rate(state.step)
        momentum = state.momentum
        if not follow_last:
            momentum = follow(momentum, state.student, rate, method.reuse)
        targets, stats = _targets(method, {"momentum": momentum, **frozen}, views, shuffle_rng)

        learned, still = method.split(state.student["params"])
        loss_fn = _loss(method, state, still, views, aux, targets, shuffle_rng)
        (loss, aside), grads = jax.value_and_grad(loss_fn, has_aux=True)(learned)
        terms, stats["student"], student = aside
        grads, stats, metrics = pmean((grads, stats, _report(loss, terms)))
        record = Record({"student": student, **targets}, aux, method.views)
        metrics |= health.measured(record, state.memory, state.step, health_steps)
        updates, opt_state = tx.update(grads, state.opt_state, learned)
        params = {**optax.apply_updates(learned, updates), **still}
        student = {"params": params, "batch_stats": stats["student"]}
        if momentum:
            momentum = {**momentum, "batch_stats": stats["momentum"]}
            if follow_last:
                momentum = follow(momentum, student, rate, method.reuse)
            metrics["ema_rate"] = rate
        metrics["learning_rate"] = learning_rate(state.step)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        memory = {name: term.memory for name, term in terms.items()}
        return TrainState(state.step + 1, student, momentum, memory, opt_state), metrics

    return train_step


def _loss(
    method: Method,
    state: TrainState,
    still: Mapping[str, Any],
    views: Mapping[int, Array],
    aux: Mapping[str, Array],
    targets: Mapping[str, Any],
    rng: Array,
) -> Callable[[Any], tuple[Array, Any]]:
    """The function to differentiate: learned parameters -> (loss, (terms, statistics, encoded))."""
    network = method.networks["student"]

    def loss_fn(learned: Mapping[str, Any]) -> tuple[Array, Any]:
        variables = {**state.student, "params": {**learned, **still}}
        maps = method.reads_maps("student")
        student, new = encode(
            network, variables, views, method.plan["student"], rng, dropout=True, maps=maps
        )
        score = {"student": _scorer(network, variables)}
        record = Record({"student": student, **targets}, aux, method.views, score)
        terms = {
            name: objective(record, state.memory[name], state.step)
            for name, objective in method.objectives.items()
        }
        return method.total(terms), (terms, new, student)

    return loss_fn


def _targets(
    method: Method, variables: Mapping[str, Variables], views: Mapping[int, Array], rng: Array
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the networks that do not learn encode, and the new statistics of the momentum one."""
    targets, stats = {}, {}
    for name in sorted(variables.keys() & method.plan.keys()):
        encoded = encode(
            method.networks[name],
            variables[name],
            views,
            method.plan[name],
            rng,
            maps=method.reads_maps(name),
        )
        targets[name], stats[name] = jax.lax.stop_gradient(encoded)
    stats.pop("teacher", None)  # frozen: its stored statistics stay what they are
    return targets, stats


def follow(
    momentum: Variables, student: Variables, rate: Array, still: Sequence[str] = ()
) -> Variables:
    """The EMA of the student's parameters: rate * old + (1 - rate) * student; {} stays {}.

    MoCo (arXiv:1911.05722) eq. 2. BatchNorm statistics are the momentum network's own, and parts
    of the student that never change, `still`, are left as they are to the bit.
    """
    if not momentum:
        return momentum
    moving = {part: tree for part, tree in momentum["params"].items() if part not in still}
    params = jax.tree.map(
        lambda old, new: rate * old + (1 - rate) * new,
        moving,
        {part: student["params"][part] for part in moving},
    )
    return {**momentum, "params": {**momentum["params"], **params}}


def _scorer(network: Network, variables: Variables) -> Callable[[Array], Array]:
    """Embeddings f32[N, D] -> scores f32[N, K] on the prototypes as they are, without gradient."""
    still = jax.lax.stop_gradient(variables)
    return lambda rows: network.encoder.apply(still, rows, method="score")


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
