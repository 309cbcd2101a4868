"""Builds methods from configs: objectives with nonzero weight and the networks they need."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from disco_jax import errors, models
from disco_jax.methods import checks, registry
from disco_jax.methods.base import OUTPUTS, Method, Objective, Record, Views
from disco_jax.models.encoder import Encoded
from disco_jax.ops.memory import QueueSettings
from disco_jax.ops.queues import QueueAccess

OBJECTIVES = registry.objectives()
REUSABLE = ("head",)


def build(config: Any, views: int = 2, local_views: int = 0) -> Method:
    """Builds the method of a config's `objectives`, `student`, `momentum` and `teacher`.

    Args:
      config: a pretraining config; see `configs/common.py`.
      views: number of global views, numbered from 0.
      local_views: number of local views, numbered after the global ones.

    Raises:
      UserError: if all objectives have weight 0 or settings contradict each other.
    """
    method = _without_networks(config, views, local_views)
    objectives = method.objectives
    checks.check(method, config)
    reuse = _reused(config, method)
    networks = {name: _network(name, config) for name in method.plan}
    if "teacher" in networks and not getattr(objectives.get("distill"), "teacher_unit", True):
        networks["teacher"] = _unnormalized(networks["teacher"])
    _check_widths(objectives, config)
    return Method(networks, objectives, method.views, reuse, _queue_settings(config))


def check(config: Any) -> None:
    """Validates the objectives without building networks.

    Raises:
      UserError: see `build`.
    """
    checks.check(_without_networks(config, config.views, config.local.count), config)


def _without_networks(config: Any, views: int, local_views: int) -> Method:
    """Builds the method with its objectives and views only."""
    objectives = _objectives(config)
    if not objectives:
        raise errors.UserError(
            "All objectives have weight 0. Set at least one of "
            + ", ".join(f"config.objectives.{name}.weight" for name in config.objectives)
            + "."
        )
    numbers = tuple(range(views + local_views))
    return Method({}, objectives, Views(numbers[:views], numbers[views:]))


def plan(config: Any) -> dict[str, tuple[int, ...]]:
    """Returns `Method.plan` of a config, which may still lack the widths of networks."""
    views = tuple(range(config.views + config.local.count))
    split = Views(views[: config.views], views[config.views :])
    return Method({}, _objectives(config), split).plan


def _objectives(config: Any) -> dict[str, Objective]:
    objectives, problems = {}, errors.Problems()
    for name, section in config.objectives.items():
        objective = problems.attempt(registry.build, name, _tuples(section))
        if objective is not None:
            objectives[name] = objective
    problems.raise_any()
    return objectives


def _queue_settings(config: Any) -> QueueSettings:
    """Returns how objectives store and process their queues, from `config.fast`."""
    one_pass = _fast(config, "losses", True)
    return QueueSettings(
        half=_fast(config, "half_queue", False),
        shared=config.batch_size if _fast(config, "shard_queue", False) else 0,
        access=QueueAccess(
            one_pass, models.compute_dtype(config.dtype) if one_pass else jnp.float32
        ),
    )


def _fast(config: Any, field: str, default: Any) -> Any:
    """Returns a field of `config.fast`, or `default` for configs of earlier versions."""
    return config.get("fast", {}).get(field, default)


def _tuples(fields: Any) -> dict[str, Any]:
    """Converts lists, as read from JSON, to tuples at all depths."""

    def convert(value: Any) -> Any:
        return tuple(map(convert, value)) if isinstance(value, (list, tuple)) else value

    return {name: convert(value) for name, value in fields.items()}


def _unnormalized(network: models.Network) -> models.Network:
    """Returns the network with a head that does not scale the embedding to length 1."""
    head = network.encoder.head
    if not network.encoder.normalised():
        return network
    encoder = network.encoder.clone(head=head.clone(l2_normalized=False))
    return dataclasses.replace(network, encoder=encoder)


def _network(name: str, config: Any) -> models.Network:
    """Builds a network of `NETWORKS` with the settings of `config.fast`."""
    # The momentum network is the student with other batch statistics.
    spec = config.teacher if name == "teacher" else config.student
    compute = models.Compute.from_config(config, name)
    augment = tuple(config.augment.mean), tuple(config.augment.std)
    network = models.build_network(spec, config[name].norm, compute, f"config.{name}", augment)
    network = dataclasses.replace(network, grouped=config.group_views)
    if name != "teacher" and "head" in config.student.reuse and config.teacher.norm == "running":
        # BatchNorm in a reused head uses the teacher's statistics (disagreement R2).
        encoder = network.encoder.clone(head_norm="running")
        return dataclasses.replace(network, encoder=encoder)
    return network


def _reused(config: Any, method: Method) -> tuple[str, ...]:
    """Returns the parts of the teacher that the student reuses.

    Raises:
      UserError: if a part is unknown, no objective has a teacher, or the heads differ.
    """
    for part in config.student.reuse:
        if part not in REUSABLE:
            raise errors.unknown("config.student.reuse", part, REUSABLE)
    if not config.student.reuse:
        return ()
    if "teacher" not in method.plan:
        raise errors.UserError(
            f"config.student.reuse={tuple(config.student.reuse)}: no objective has a teacher whose "
            "head could be reused. Set config.objectives.distill.weight, or set reuse to ()."
        )
    if config.teacher.head == "none":
        raise errors.UserError(
            "config.student.reuse=('head',): the teacher has no head (config.teacher.head='none'). "
            "Use weights that include the projection head, or set reuse to ()."
        )
    student, teacher = (
        [spec.get(f, 0) for f in ("head", "dim", "hidden", "layers")]
        for spec in (config.student, config.teacher)
    )
    if student != teacher or not config.student.adapter:
        raise errors.UserError(
            f"config.student.reuse=('head',) copies the teacher's head: set config.student.head="
            f"{teacher[0]}, dim={teacher[1]}, hidden={teacher[2]}, layers={teacher[3]} and adapter="
            f"{models.width(config.teacher)}, or call teacher.resolve, which sets them."
        )
    return tuple(config.student.reuse)


def _check_widths(objectives: Mapping[str, Objective], config: Any) -> None:
    """Checks that the student's embedding is as wide as the teacher output it must match.

    Raises:
      UserError: if the widths differ, with the width to set.
    """
    for name, objective in objectives.items():
        output = objective.match_width()
        if output is None:
            continue
        if output not in OUTPUTS:
            raise errors.unknown(f"config.objectives.{name}.teacher_output", output, OUTPUTS)
        student_dim, teacher_dim = dim(config.student), dim(config.teacher, output)
        if student_dim == teacher_dim:
            continue
        if output == "embedding" and config.teacher.head != "none":
            target = (
                f"config.teacher.dim={teacher_dim}: the student matches the teacher's embedding"
            )
        else:
            target = f"the {teacher_dim} features of the teacher, which the student matches"
        head = "--config.student.head=mlp " if config.student.head == "none" else ""
        raise errors.UserError(
            f"config.student.dim={student_dim} must equal {target} (config.objectives.{name}). "
            f"Set {head}--config.student.dim={teacher_dim}."
        )


def dim(spec: Any, output: str = "embedding") -> int:
    """Returns the width of a network's output.

    Args:
      spec: `config.student` or `config.teacher`.
      output: an element of `OUTPUTS`.
    """
    if output == "features" or spec.head == "none":
        return models.width(spec)
    return spec.dim


def _row(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, size), jnp.float32)


def memory_bytes(method: Method, config: Any) -> int:
    """Returns the bytes of the objectives' memory on each device.

    Sharded queues count with their size on all devices together.

    Args:
      method: result of `build(config)`.
      config: a resolved config, which has the widths of its networks.
    """
    encoded = {}
    for name, views in method.plan.items():
        spec = config.teacher if name == "teacher" else config.student
        sizes = dim(spec, "features"), dim(spec), sum(spec.prototypes)
        encoded[name] = dict.fromkeys(views, jax.eval_shape(Encoded, *map(_row, sizes)))
    memory = jax.eval_shape(lambda: method.memory(jax.random.key(0), Record(encoded, {})))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(memory))
