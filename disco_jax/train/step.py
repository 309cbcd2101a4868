"""The train step, written for one replica, and its `pmap`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from jax import Array

from disco_jax.methods.base import Method
from disco_jax.models.encoder import Variables
from disco_jax.ops.collectives import AXIS, positions
from disco_jax.train import optimizer
from disco_jax.train.learner import Learner, Metrics, learn, targets_of
from disco_jax.train.state import TrainState

# Keys of views below this are augmentation's.
_MIXING = 1 << 16
Step = Callable[[TrainState, Mapping[str, Variables], Any], tuple[TrainState, Metrics]]


class Photometric(Protocol):
    """What the step asks of a recipe: crops u8[B, H, W, 3] to images f32[B, H, W, 3], a view."""

    def photometric(
        self, views: Mapping[int, Array], key: Array, positions: Array
    ) -> Mapping[int, Array]: ...


class Built(NamedTuple):
    """A step and what it was made of.

    Attributes:
      train_step: of one replica.
      learner: its student's part; has the optimizer whose state is in the step's.
    """

    train_step: Step
    learner: Learner


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
    learner = learner_of(config, method, steps_per_epoch)
    return Built(make_train_step(learner, recipe, config.seed), learner)


def learner_of(config: Any, method: Method, steps_per_epoch: int) -> Learner:
    """How the student of a pretraining config learns; the arguments are those of `from_config`."""
    epochs = config.total_epochs
    rate = optimizer.learning_rate(config.learning_rate, config.batch_size, steps_per_epoch, epochs)
    return Learner(
        method,
        optimizer.build(config.optimizer, rate, steps_per_epoch, epochs),
        learning_rate=rate,
        ema_rate=optimizer.ema_rate(config.momentum, steps_per_epoch * epochs),
        follow_last=config.momentum.follow == "after",
        health_steps=config.log.every_steps,
    )


def make_train_step(learner: Learner, recipe: Photometric, seed: int) -> Step:
    """The step of one replica: (state, frozen, batch) -> (state, metrics).

    Args:
      learner: how the student learns.
      recipe: makes normalised images of crops.
      seed: of augmentation, shuffling and the student's dropout; folded with the step and an
        image's global position, so that a replay draws the same on any number of devices.

    Returns:
      The step. `frozen` maps "teacher" to its variables; `batch` holds "views" and "aux".
    """
    joint = make_joint_step({"": learner}, recipe, seed)

    def train_step(state: TrainState, frozen: Mapping[str, Variables], batch: Any):
        states, metrics = joint({"": state}, frozen, batch)
        return states[""], metrics[""]

    return train_step


def make_joint_step(
    learners: Mapping[str, Learner], recipe: Photometric, seed: int
) -> Callable[..., tuple[dict[str, TrainState], dict[str, Metrics]]]:
    """The step of several students on one replica: (states, frozen, batch) -> (states, metrics).

    The images are made once and the teacher sees them once; each student learns from them what it
    would learn alone.

    Args:
      learners: name -> how a student learns; their teachers are one, and views that their
        objectives mix and their teacher sees are mixed alike.
      recipe, seed: of all; see `make_train_step`.

    Returns:
      The step; states and metrics are by the names of `learners`, and the states' steps are equal.
    """

    def train_step(states: Mapping[str, TrainState], frozen: Mapping[str, Variables], batch: Any):
        step = next(iter(states.values())).step
        augment_rng, rng = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
        size = next(iter(batch["views"].values())).shape[0]
        views = recipe.photometric(batch["views"], augment_rng, positions(size))
        mixing = jax.random.fold_in(augment_rng, _MIXING)
        seen = {n: one.method.mix(views, batch["aux"], mixing) for n, one in learners.items()}
        methods = [one.method for one in learners.values()]
        everything = functools.reduce(lambda a, b: {**a, **b[0]}, seen.values(), {})
        teacher = _teacher(methods, frozen, everything, rng)
        made = {n: learn(one, states[n], teacher, *seen[n], rng) for n, one in learners.items()}
        return {n: state for n, (state, _) in made.items()}, {n: m for n, (_, m) in made.items()}

    return train_step


def _teacher(
    methods: Sequence[Method],
    frozen: Mapping[str, Variables],
    views: Mapping[int, Array],
    rng: Array,
) -> dict[str, Any]:
    """{"teacher": view -> `Encoded`} of every view that some method asks for; {} if none does."""
    wanted = sorted({view for method in methods for view in method.plan.get("teacher", ())})
    if not wanted:
        return {}
    # Of those that have one, a method that reads its maps if there is one.
    method = max((m for m in methods if "teacher" in m.plan), key=lambda m: m.reads_maps("teacher"))
    encoded, _ = targets_of(method, "teacher", frozen["teacher"], views, wanted, rng)
    return {"teacher": encoded}  # its stored statistics stay what they are


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
