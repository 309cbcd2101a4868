"""The update of one student in a step, from views and the teacher's outputs to the next state."""

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
    """The parts of a step that belong to one student; several may share views and a teacher.

    Attributes:
      method: networks and objectives.
      tx: the optimizer.
      learning_rate: only for the metrics; `tx` contains its own schedule.
      ema_rate: step -> decay of the EMA, the weight of the old momentum parameters.
      follow_last: if true, the momentum network is updated from the updated student at the end
        of the step.
      health_steps: number of steps between two measurements of `health.measured`.
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
    """Takes one step of one student on one replica.

    The order is that of the official code of MoCo and DisCo: the EMA of the student before this
    step's update gives the momentum network, which then encodes the keys; the losses read the
    queues before the keys are pushed; the optimizer runs last. In DINO (`follow_last`) the EMA is
    updated after the optimizer.

    Args:
      learner: networks, objectives and schedules.
      state: the state before the step.
      teacher: {"teacher": view -> `Encoded`}, without a gradient; {} if the method has no teacher.
      views: view -> f32[B, H, W, 3], normalised.
      aux: name -> array[B, ...], other data of the images.
      rng: key for shuffling and the student's dropout, equal on all replicas.

    Returns:
      The state after the step, and the metrics averaged over replicas.
    """
    method = learner.method
    rate = learner.ema_rate(state.step)
    momentum = state.momentum
    if not learner.follow_last:
        momentum = update_ema(momentum, state.student, rate, method.reuse)
    targets, stats = dict(teacher), {}
    if "momentum" in method.plan:
        encoded = targets_of(method, "momentum", momentum, views, method.plan["momentum"], rng)
        targets["momentum"], stats["momentum"] = encoded

    learned, frozen = method.split(state.student["params"])
    loss_fn = _loss(method, state, frozen, views, aux, targets, rng)
    (loss, extra), grads = jax.value_and_grad(loss_fn, has_aux=True)(learned)
    terms, stats["student"], student = extra
    grads, stats, metrics = pmean((grads, stats, _report(loss, terms)))
    record = Record({"student": student, **targets}, aux, method.views)
    metrics |= health.measured(record, state.memory, state.step, learner.health_steps)
    updates, opt_state = learner.tx.update(grads, state.opt_state, learned)
    params = {**optax.apply_updates(learned, updates), **frozen}
    student = {"params": params, "batch_stats": stats["student"]}
    if momentum:
        momentum = {**momentum, "batch_stats": stats["momentum"]}
        if learner.follow_last:
            momentum = update_ema(momentum, student, rate, method.reuse)
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
    numbers: Sequence[int],
    rng: Array,
) -> tuple[Mapping[int, Any], Any]:
    """Encodes views with a network that receives no gradient.

    Args:
      method: contains the network.
      name: "momentum" or "teacher".
      variables: of the network.
      views: view -> f32[B, H, W, 3].
      numbers: the views to encode.
      rng: see `encode`.

    Returns:
      view -> `Encoded`, and the network's updated batch statistics.
    """
    maps = method.reads_maps(name)
    encoded = encode(method.networks[name], variables, views, numbers, rng, maps=maps)
    return jax.lax.stop_gradient(encoded)


def update_ema(
    momentum: Variables, student: Variables, rate: Array, frozen: Sequence[str] = ()
) -> Variables:
    """Updates the EMA of the student's parameters: rate * old + (1 - rate) * student.

    MoCo (arXiv:1911.05722) eq. 2. The momentum network keeps its own BatchNorm statistics.

    Args:
      momentum: {"params", "batch_stats"} of the EMA; {} is returned unchanged.
      student: the same of the student.
      rate: f32[], the weight of the old parameters.
      frozen: parts of the student that are never trained; they keep their exact values.
    """
    if not momentum:
        return momentum
    moving = {part: tree for part, tree in momentum["params"].items() if part not in frozen}
    params = jax.tree.map(
        lambda old, new: rate * old + (1 - rate) * new,
        moving,
        {part: student["params"][part] for part in moving},
    )
    return {**momentum, "params": {**momentum["params"], **params}}


def _loss(
    method: Method,
    state: TrainState,
    frozen: Mapping[str, Any],
    views: Mapping[int, Array],
    aux: Mapping[str, Array],
    targets: Mapping[str, Any],
    rng: Array,
) -> Callable[[Any], tuple[Array, Any]]:
    """Returns the function to differentiate.

    Args:
      method: networks and objectives.
      state: the state before the step.
      frozen: parameters of the student that are not trained.
      views, aux: see `learn`.
      targets: network -> view -> `Encoded`, of the momentum network and the teacher.
      rng: see `learn`.

    Returns:
      learned parameters -> (loss, (terms, batch statistics, the student's encodings)).
    """
    network = method.networks["student"]

    def loss_fn(learned: Mapping[str, Any]) -> tuple[Array, Any]:
        variables = {**state.student, "params": {**learned, **frozen}}
        maps = method.reads_maps("student")
        student, stats = encode(
            network, variables, views, method.plan["student"], rng, dropout=True, maps=maps
        )
        score = {"student": _scorer(network, variables)}
        record = Record({"student": student, **targets}, aux, method.views, score)
        terms = {
            name: objective(record, state.memory[name], state.step)
            for name, objective in method.objectives.items()
        }
        return method.total(terms), (terms, stats, student)

    return loss_fn


def _scorer(network: Network, variables: Variables) -> Callable[[Array], Array]:
    """Returns f32[N, D] embeddings -> f32[N, K] scores on the prototypes, without a gradient."""
    constants = jax.lax.stop_gradient(variables)

    def score(rows: Array) -> Array:
        # `Any`: flax annotates a pair, which `apply` returns only with mutable collections.
        scores: Any = network.encoder.apply(constants, rows, method="score")
        return scores

    return score


def _report(loss: Array, terms: Mapping[str, Term]) -> Metrics:
    """Returns the metrics {"loss", "contrast/loss", "contrast/accuracy", ...} as f32."""
    metrics = {"loss": loss}
    for name, term in terms.items():
        metrics[f"{name}/loss"] = term.loss
        metrics |= {f"{name}/{key}": value for key, value in term.metrics.items()}
    return jax.tree.map(lambda value: value.astype(jnp.float32), metrics)
