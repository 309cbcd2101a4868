"""How one student learns in a step: from images and a teacher's outputs to its next state."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from disco_jax.methods.base import Method, Record, Term
from disco_jax.models.encoder import Network, Variables, encode
from disco_jax.ops.collectives import pmean
from disco_jax.ops.schedules import Schedule
from disco_jax.train import health
from disco_jax.train.state import TrainState

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Learner:
    """All of a step that is one student's own; images and the teacher may serve several.

    Attributes:
      method: networks and objectives.
      tx: the optimizer.
      learning_rate: only for the metrics; `tx` has its own.
      ema_rate: step -> the share of the old momentum weights that is kept.
      follow_last: the momentum network follows the updated student, at the end of the step.
      health_steps: signals of health are measured every so many steps; see `health.measured`.
    """

    method: Method
    tx: optax.GradientTransformation
    learning_rate: Schedule
    ema_rate: Schedule
    follow_last: bool = False
    health_steps: int = 1


def learn(
    learner: Learner,
    state: TrainState,
    teacher: Mapping[str, Any],
    views: Mapping[int, Array],
    aux: Mapping[str, Array],
    rng: Array,
) -> tuple[TrainState, Metrics]:
    """One step of one student on one replica.

    The order is that of the official MoCo and DisCo: the momentum network follows the student as
    it is before this step's update, then encodes the keys; the losses read the queues before the
    keys enter them; the optimizer comes last. In DINO (`follow_last`) the momentum network follows
    after the optimizer.

    Args:
      learner: how it learns.
      state: before the step.
      teacher: {"teacher": view -> `Encoded`}, without a gradient; {} if the method has none.
      views: view -> f32[B, H, W, 3], normalised.
      aux: name -> array[B, ...], what else there is of the images.
      rng: of shuffling and the student's dropout, equal on all replicas.
    """
    method = learner.method
    rate = learner.ema_rate(state.step)
    momentum = state.momentum
    if not learner.follow_last:
        momentum = follow(momentum, state.student, rate, method.reuse)
    targets, stats = dict(teacher), {}
    if "momentum" in method.plan:
        encoded = targets_of(method, "momentum", momentum, views, method.plan["momentum"], rng)
        targets["momentum"], stats["momentum"] = encoded

    learned, still = method.split(state.student["params"])
    loss_fn = _loss(method, state, still, views, aux, targets, rng)
    (loss, aside), grads = jax.value_and_grad(loss_fn, has_aux=True)(learned)
    terms, stats["student"], student = aside
    grads, stats, metrics = pmean((grads, stats, _report(loss, terms)))
    record = Record({"student": student, **targets}, aux, method.views)
    metrics |= health.measured(record, state.memory, state.step, learner.health_steps)
    updates, opt_state = learner.tx.update(grads, state.opt_state, learned)
    params = {**optax.apply_updates(learned, updates), **still}
    student = {"params": params, "batch_stats": stats["student"]}
    if momentum:
        momentum = {**momentum, "batch_stats": stats["momentum"]}
        if learner.follow_last:
            momentum = follow(momentum, student, rate, method.reuse)
        metrics["ema_rate"] = rate
    metrics["learning_rate"] = learner.learning_rate(state.step)
    metrics["gradient_norm"] = optax.tree.norm(grads)
    memory = {name: term.memory for name, term in terms.items()}
    return TrainState(state.step + 1, student, momentum, memory, opt_state), metrics


def targets_of(
    method: Method,
    name: str,
    variables: Variables,
    views: Mapping[int, Array],
    wanted: Sequence[int],
    rng: Array,
) -> tuple[Mapping[int, Any], Any]:
    """What a network that does not learn makes of views, and its new statistics.

    Args:
      method: whose network it is.
      name: "momentum" or "teacher".
      variables: of the network.
      views: view -> f32[B, H, W, 3].
      wanted: which of them to encode.
      rng: see `encode`.
    """
    maps = method.reads_maps(name)
    encoded = encode(method.networks[name], variables, views, wanted, rng, maps=maps)
    return jax.lax.stop_gradient(encoded)


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


def _scorer(network: Network, variables: Variables) -> Callable[[Array], Array]:
    """Embeddings f32[N, D] -> scores f32[N, K] on the prototypes as they are, without gradient."""
    still = jax.lax.stop_gradient(variables)

    def score(rows: Array) -> Array:
        scores: Any = network.encoder.apply(still, rows, method="score")  # a pair if mutable only
        return scores

    return score


def _report(loss: Array, terms: Mapping[str, Term]) -> Metrics:
    """{"loss", "contrast/loss", "contrast/accuracy", ...}."""
    metrics = {"loss": loss}
    for name, term in terms.items():
        metrics[f"{name}/loss"] = term.loss
        metrics |= {f"{name}/{key}": value for key, value in term.metrics.items()}
    return jax.tree.map(lambda value: value.astype(jnp.float32), metrics)
