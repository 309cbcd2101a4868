"""The train step, written for one replica, and its `jax.pmap`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.data.targets import KEY
from disco_jax.methods.base import Method
from disco_jax.models.encoder import Encoded, Variables
from disco_jax.ops.collectives import AXIS, positions
from disco_jax.train import optimizer
from disco_jax.train.learner import Learner, Metrics, learn, targets_of
from disco_jax.train.run_settings import RunSettings
from disco_jax.train.state import TrainState, axes

# Folded into the step's key to mix views; augmentation folds in the views' smaller numbers.
_MIXING = 1 << 16
Step = Callable[[TrainState, Mapping[str, Variables], Any], tuple[TrainState, Metrics]]
# The step of one student, of several students or of a classifier.
AnyStep = Callable[[Any, Any, Any], tuple[Any, Any]]


class Photometric(Protocol):
    """The part of a recipe that the step uses: crops u8[B, H, W, 3] -> images f32[B, H, W, 3]."""

    def photometric(
        self, views: Mapping[int, Array], key: Array, positions: Array
    ) -> Mapping[int, Array]: ...


class Built(NamedTuple):
    """A step and the learner that it was built from.

    Attributes:
      train_step: the step of one replica.
      learner: how the student learns; its optimizer's state is part of the step's state.
    """

    train_step: Step
    learner: Learner


def from_settings(
    settings: RunSettings,
    method: Method,
    recipe: Photometric,
    steps_per_epoch: int,
    period: int = 0,
) -> Built:
    """Builds the step of a pretraining run; see `make_train_step`.

    Args:
      settings: resolved.
      method: the output of `methods.build` for these settings.
      recipe: the output of `views.build` for these settings.
      steps_per_epoch: for the schedules.
      period: see `make_joint_step`.

    Raises:
      UserError: a setting of the optimizer or of the schedules is invalid.
    """
    learner = learner_of(settings, method, steps_per_epoch)
    return Built(make_train_step(learner, recipe, settings.seed, period), learner)


def learner_of(settings: RunSettings, method: Method, steps_per_epoch: int) -> Learner:
    """Builds the learner of a pretraining run; takes the arguments of `from_settings`."""
    epochs, momentum = settings.total_epochs, settings.momentum
    rate = optimizer.learning_rate(
        settings.learning_rate, settings.batch_size, steps_per_epoch, epochs
    )
    return Learner(
        method,
        optimizer.build(settings.optimizer, rate, steps_per_epoch, epochs),
        learning_rate=rate,
        ema_rate=optimizer.ema_rate(
            momentum.ema_rate, momentum.ema_rate_end, steps_per_epoch * epochs
        ),
        follow_last=momentum.follow == "after",
        health_steps=settings.log.every_steps,
    )


def make_train_step(learner: Learner, recipe: Photometric, seed: int, period: int = 0) -> Step:
    """Builds the step of one replica: (state, frozen, batch) -> (state, metrics).

    Args:
      learner: how the student learns.
      recipe: turns crops into normalised images.
      seed: seed of augmentation, shuffling and the student's dropout. It is folded with the step
        and an image's global position, so that a replay draws the same numbers on any number of
        devices.
      period: see `make_joint_step`.

    Returns:
      The step. `frozen` maps "teacher" to its variables; `batch` holds "views" and "aux".
    """
    joint = make_joint_step({"": learner}, recipe, seed, period)

    def train_step(state: TrainState, frozen: Mapping[str, Variables], batch: Any):
        states, metrics = joint({"": state}, frozen, batch)
        return states[""], metrics[""]

    return train_step


def make_joint_step(
    learners: Mapping[str, Learner], recipe: Photometric, seed: int, period: int = 0
) -> Callable[..., tuple[dict[str, TrainState], dict[str, Metrics]]]:
    """Builds the step of several students on one replica.

    The step augments the images once and runs the teacher on them once. Each student learns
    exactly what it would learn alone.

    Args:
      learners: name -> how a student learns. All have the same teacher, and all mix a view in the
        same way if their teacher encodes the mixed view.
      recipe, seed: shared by all students; see `make_train_step`.
      period: number of steps after which the random draws of the views repeat, for batches that
        carry cached outputs of the teacher (`data/targets.py`); 0: they never repeat.

    Returns:
      (states, frozen, batch) -> (states, metrics); states and metrics are keyed by the names of
      `learners`, and all states are at the same step.
    """

    def train_step(states: Mapping[str, TrainState], frozen: Mapping[str, Variables], batch: Any):
        step = next(iter(states.values())).step
        rng = _keys(seed, step)[1]
        aux = dict(batch["aux"])
        cached = aux.pop(KEY, None)
        views, mixing = _views(recipe, seed, step % period if period else step, batch["views"])
        inputs = {n: one.method.augment_batch(views, aux, mixing) for n, one in learners.items()}
        if cached is None:
            methods = [one.method for one in learners.values()]
            all_views: dict[int, Array] = {}
            for mixed, _ in inputs.values():
                all_views |= mixed
            teacher = _teacher(methods, frozen, all_views, rng)
        else:
            teacher = {"teacher": {view: _encoded(outputs) for view, outputs in cached.items()}}
        steps = {n: learn(one, states[n], teacher, *inputs[n], rng) for n, one in learners.items()}
        return {n: state for n, (state, _) in steps.items()}, {n: m for n, (_, m) in steps.items()}

    return train_step


def make_targets(
    method: Method, recipe: Photometric, seed: int, names: Sequence[str]
) -> Callable[[Array, Mapping[str, Variables], Any], dict[int, dict[str, Array]]]:
    """Builds the function that encodes the views of a step with the teacher, on one replica.

    Args:
      method: its plan lists the views that the teacher encodes.
      recipe, seed: see `make_train_step`; the views equal those of the train step.
      names: fields of `Encoded` to return.

    Returns:
      (step, frozen, batch) -> {view: {name: f32[B, D]}}.
    """

    def targets(step: Array, frozen: Mapping[str, Variables], batch: Any):
        views, mixing = _views(recipe, seed, step, batch["views"])
        views, _ = method.augment_batch(views, batch["aux"], mixing)
        encoded = _teacher([method], frozen, views, _keys(seed, step)[1])["teacher"]
        return {v: {name: getattr(out, name) for name in names} for v, out in encoded.items()}

    return targets


def _keys(seed: int, step: Array) -> Array:
    """Returns two keys of a step: for the augmentation, and for all other random draws."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step))


def _views(
    recipe: Photometric, seed: int, step: Array, crops: Mapping[int, Array]
) -> tuple[Mapping[int, Array], Array]:
    """Returns the augmented views of a step, and the key for mixing them."""
    key = _keys(seed, step)[0]
    size = next(iter(crops.values())).shape[0]
    return recipe.photometric(crops, key, positions(size)), jax.random.fold_in(key, _MIXING)


def _encoded(outputs: Mapping[str, Array]) -> Encoded:
    """Converts cached outputs of the teacher to `Encoded`; fields that are not cached are None."""
    rows = {name: cached.astype(jnp.float32) for name, cached in outputs.items()}
    return Encoded(rows.get("features"), rows.get("embedding"))


def _teacher(
    methods: Sequence[Method],
    frozen: Mapping[str, Variables],
    views: Mapping[int, Array],
    rng: Array,
) -> dict[str, Any]:
    """Returns {"teacher": view -> `Encoded`} for every view in the plan of some method.

    Returns {} if no method has a teacher.
    """
    needed = sorted({view for method in methods for view in method.plan.get("teacher", ())})
    if not needed:
        return {}
    # A method that reads the teacher's maps is preferred, since only its encoding contains them.
    method = max((m for m in methods if "teacher" in m.plan), key=lambda m: m.reads_maps("teacher"))
    encoded, _ = targets_of(method, "teacher", frozen["teacher"], views, needed, rng)
    return {"teacher": encoded}  # the updated statistics are dropped: the teacher is frozen


def parallel_targets(targets: Callable) -> Callable:
    """Maps the function from `make_targets` over all devices; its outputs are split by device."""
    return jax.pmap(targets, AXIS, in_axes=(None, None, 0))


def parallel(train_step: AnyStep, devices: Sequence[jax.Device] | None = None) -> "Parallel":
    """Maps `train_step` over all devices: the batch is split, everything else is replicated.

    Sharded queues (see `state.replicate`) are split too; they are detected from the first state.

    Args:
      train_step: the step of one replica.
      devices: devices to use; None: all devices of all hosts.
    """
    return Parallel(train_step, devices)


class Parallel:
    """A train step mapped over devices, compiled at the first call; see `parallel`."""

    def __init__(self, train_step: AnyStep, devices: Sequence[jax.Device] | None):
        self._train_step, self._devices = train_step, devices
        self._mapped: jax.stages.Wrapped | None = None
        self._structure: Any = None  # JAX does not annotate the methods of PyTreeDef

    def __call__(self, state: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
        leaves, metrics = self._mapped_for(state)(state, frozen, batch)
        return jax.tree.unflatten(self._structure, leaves), metrics

    def lower(self, state: Any, frozen: Any, batch: Any) -> jax.stages.Lowered:
        """Lowers the step for arrays or shapes; the lowered step returns the state's leaves."""
        return self._mapped_for(state).lower(state, frozen, batch)

    def _mapped_for(self, state: Any) -> jax.stages.Wrapped:
        if self._mapped is None:
            self._structure, state_axes = jax.tree.structure(state), axes(state)
            # With several processes, pmap needs hashable output axes: a tuple, not a tree.
            leaf_axes = tuple(self._structure.flatten_up_to(state_axes))
            self._mapped = jax.pmap(
                self._leaves,
                AXIS,
                in_axes=(state_axes, None, 0),
                out_axes=(leaf_axes, None),
                donate_argnums=0,
                devices=self._devices,
            )
        return self._mapped

    def _leaves(self, state: Any, frozen: Any, batch: Any) -> tuple[tuple[Array, ...], Any]:
        state, metrics = self._train_step(state, frozen, batch)
        return tuple(jax.tree.leaves(state)), metrics
