"""The train step, written for one replica, and its `pmap`."""

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
from disco_jax.train.state import TrainState, axes

# Keys of views below this are augmentation's.
_MIXING = 1 << 16
Step = Callable[[TrainState, Mapping[str, Variables], Any], tuple[TrainState, Metrics]]
# Of one student, of several, or of a classifier.
AnyStep = Callable[[Any, Any, Any], tuple[Any, Any]]


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


def from_config(
    config: Any, method: Method, recipe: Photometric, steps_per_epoch: int, period: int = 0
) -> Built:
    """The step of a pretraining config; see `make_train_step`.

    Args:
      config: see `configs/common.py`, resolved.
      method: what `methods.build` made of it.
      recipe: what `views.build` did.
      steps_per_epoch: for the schedules.
      period: see `make_joint_step`.

    Raises:
      UserError: a setting of the optimizer or the schedules will not do.
    """
    learner = learner_of(config, method, steps_per_epoch)
    return Built(make_train_step(learner, recipe, config.seed, period), learner)


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


def make_train_step(learner: Learner, recipe: Photometric, seed: int, period: int = 0) -> Step:
    """The step of one replica: (state, frozen, batch) -> (state, metrics).

    Args:
      learner: how the student learns.
      recipe: makes normalised images of crops.
      seed: of augmentation, shuffling and the student's dropout; folded with the step and an
        image's global position, so that a replay draws the same on any number of devices.
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
    """The step of several students on one replica: (states, frozen, batch) -> (states, metrics).

    The images are made once and the teacher sees them once; each student learns from them what it
    would learn alone.

    Args:
      learners: name -> how a student learns; their teachers are one, and views that their
        objectives mix and their teacher sees are mixed alike.
      recipe, seed: of all; see `make_train_step`.
      period: steps after which the views are drawn as from the first one on, for outputs of the
        teacher that come with the batch (`data/targets.py`); 0: never.

    Returns:
      The step; states and metrics are by the names of `learners`, and the states' steps are equal.
    """

    def train_step(states: Mapping[str, TrainState], frozen: Mapping[str, Variables], batch: Any):
        step = next(iter(states.values())).step
        rng = _keys(seed, step)[1]
        aux = dict(batch["aux"])
        kept = aux.pop(KEY, None)
        views, mixing = _views(recipe, seed, step % period if period else step, batch["views"])
        seen = {n: one.method.mix(views, aux, mixing) for n, one in learners.items()}
        if kept is None:
            methods = [one.method for one in learners.values()]
            everything: dict[int, Array] = {}
            for mixed, _ in seen.values():
                everything |= mixed
            teacher = _teacher(methods, frozen, everything, rng)
        else:
            teacher = {"teacher": {view: _encoded(outputs) for view, outputs in kept.items()}}
        made = {n: learn(one, states[n], teacher, *seen[n], rng) for n, one in learners.items()}
        return {n: state for n, (state, _) in made.items()}, {n: m for n, (_, m) in made.items()}

    return train_step


def make_targets(
    method: Method, recipe: Photometric, seed: int, names: Sequence[str]
) -> Callable[[Array, Mapping[str, Variables], Any], dict[int, dict[str, Array]]]:
    """What the teacher says of the views of a step, on one replica: (step, frozen, batch) -> ...

    Args:
      method: whose teacher and views.
      recipe, seed: see `make_train_step`; the views are those of its step.
      names: fields of `Encoded` to return.

    Returns:
      A function to {view: {name: f32[B, D]}}.
    """

    def targets(step: Array, frozen: Mapping[str, Variables], batch: Any):
        views, mixing = _views(recipe, seed, step, batch["views"])
        views, _ = method.mix(views, batch["aux"], mixing)
        encoded = _teacher([method], frozen, views, _keys(seed, step)[1])["teacher"]
        return {v: {name: getattr(out, name) for name in names} for v, out in encoded.items()}

    return targets


def _keys(seed: int, step: Array) -> Array:
    """Of augmentation, and of everything else that is drawn in a step."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step))


def _views(
    recipe: Photometric, seed: int, step: Array, crops: Mapping[int, Array]
) -> tuple[Mapping[int, Array], Array]:
    """The views of a step, and the key that mixes them."""
    key = _keys(seed, step)[0]
    size = next(iter(crops.values())).shape[0]
    return recipe.photometric(crops, key, positions(size)), jax.random.fold_in(key, _MIXING)


def _encoded(outputs: Mapping[str, Array]) -> Encoded:
    """What is kept of a teacher, as it would say it; the rest nobody reads."""
    found = {name: rows.astype(jnp.float32) for name, rows in outputs.items()}
    return Encoded(found.get("features"), found.get("embedding"))


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


def parallel_targets(targets: Callable) -> Callable:
    """What `make_targets` made, on every device; what comes out is split like the batch."""
    return jax.pmap(targets, AXIS, in_axes=(None, None, 0))


def parallel(train_step: AnyStep, devices: Sequence[jax.Device] | None = None) -> "Parallel":
    """`train_step` on every device: the batch is split, all else is equal on all of them.

    But for queues that the devices share, see `state.everywhere`: which these are, the state tells
    that comes first.

    Args:
      train_step: of one replica.
      devices: which; None: all of all hosts.
    """
    return Parallel(train_step, devices)


class Parallel:
    """See `parallel`."""

    def __init__(self, train_step: AnyStep, devices: Sequence[jax.Device] | None):
        self._train_step, self._devices = train_step, devices
        self._mapped: jax.stages.Wrapped | None = None
        self._structure: Any = None  # JAX's own types do not say what a PyTreeDef can do

    def __call__(self, state: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
        leaves, metrics = self._of(state)(state, frozen, batch)
        return jax.tree.unflatten(self._structure, leaves), metrics

    def lower(self, state: Any, frozen: Any, batch: Any) -> jax.stages.Lowered:
        """The step for the compiler, of arrays or shapes; it returns the leaves of the state."""
        return self._of(state).lower(state, frozen, batch)

    def _of(self, state: Any) -> jax.stages.Wrapped:
        if self._mapped is None:
            self._structure, differing = jax.tree.structure(state), axes(state)
            # Of several processes, pmap wants axes that can be hashed: a tuple, not a tree.
            each = tuple(self._structure.flatten_up_to(differing))
            self._mapped = jax.pmap(
                self._leaves,
                AXIS,
                in_axes=(differing, None, 0),
                out_axes=(each, None),
                donate_argnums=0,
                devices=self._devices,
            )
        return self._mapped

    def _leaves(self, state: Any, frozen: Any, batch: Any) -> tuple[tuple[Array, ...], Any]:
        state, metrics = self._train_step(state, frozen, batch)
        return tuple(jax.tree.leaves(state)), metrics
