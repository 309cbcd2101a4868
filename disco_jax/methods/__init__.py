"""Builds methods from settings: objectives with nonzero weight and the networks they need."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from disco_jax import errors, models
from disco_jax.methods import checks, registry
from disco_jax.methods.base import OUTPUTS, Method, Objective, Record, Views
from disco_jax.methods.method_settings import MethodSettings
from disco_jax.models.encoder import Encoded
from disco_jax.ops.memory import QueueSettings
from disco_jax.ops.queues import QueueAccess

OBJECTIVES = registry.objectives()
REUSABLE = ("head",)


def build(settings: MethodSettings) -> Method:
    """Builds the method of a run's objectives and networks.

    Raises:
      UserError: if all objectives have weight 0 or settings contradict each other.
    """
    method = _without_networks(settings)
    objectives = method.objectives
    checks.check(method, settings)
    reuse = _reused(settings, method)
    networks = {name: _network(name, settings) for name in method.plan}
    if "teacher" in networks and not getattr(objectives.get("distill"), "teacher_unit", True):
        networks["teacher"] = _unnormalized(networks["teacher"])
    _check_widths(objectives, settings)
    return Method(networks, objectives, method.views, reuse, _queue_settings(settings))


def check(settings: MethodSettings) -> None:
    """Validates the objectives without building networks.

    Raises:
      UserError: see `build`.
    """
    checks.check(_without_networks(settings), settings)


def _without_networks(settings: MethodSettings) -> Method:
    """Builds the method with its objectives and views only."""
    objectives = _objectives(settings)
    if not objectives:
        raise errors.UserError(
            "All objectives have weight 0. Set at least one of "
            + ", ".join(f"config.objectives.{name}.weight" for name in settings.objectives)
            + "."
        )
    return Method({}, objectives, _views(settings))


def plan(settings: MethodSettings) -> dict[str, tuple[int, ...]]:
    """Returns `Method.plan` of settings, which may still lack the widths of networks."""
    return Method({}, _objectives(settings), _views(settings)).plan


def _views(settings: MethodSettings) -> Views:
    numbers = tuple(range(settings.views + settings.local_views))
    return Views(numbers[: settings.views], numbers[settings.views :])


def _objectives(settings: MethodSettings) -> dict[str, Objective]:
    objectives, problems = {}, errors.Problems()
    for name, section in settings.objectives.items():
        objective = problems.attempt(registry.build, name, section)
        if objective is not None:
            objectives[name] = objective
    problems.raise_any()
    return objectives


def _queue_settings(settings: MethodSettings) -> QueueSettings:
    """Returns how objectives store and process their queues, from `config.fast`."""
    fast = settings.fast
    dtype = models.compute_dtype(settings.dtype) if fast.losses else jnp.float32
    return QueueSettings(
        half=fast.half_queue,
        shared=settings.batch_size if fast.shard_queue else 0,
        access=QueueAccess(fast.losses, dtype),
    )


def _unnormalized(network: models.Network) -> models.Network:
    """Returns the network with a head that does not scale the embedding to length 1."""
    head = network.encoder.head
    if not network.encoder.normalised():
        return network
    encoder = network.encoder.clone(head=head.clone(l2_normalized=False))
    return dataclasses.replace(network, encoder=encoder)


def _compute(name: str, norm: str, settings: MethodSettings) -> models.Compute:
    """Returns how a network is computed, with the groups of images that share statistics."""
    compute = models.Compute.from_settings(settings.fast, settings.dtype, name)
    group = _spec(name, settings).norm_group
    if not group or norm != "sync":
        return compute
    return dataclasses.replace(compute, sync_groups=settings.batch_size // group)


def _network(name: str, settings: MethodSettings) -> models.Network:
    """Builds a network of `NETWORKS` with the settings of `config.fast`."""
    student, teacher = settings.student, settings.teacher
    norms = {"student": student.norm, "momentum": settings.momentum.norm, "teacher": teacher.norm}
    network = models.build_network(
        _spec(name, settings),
        norms[name],
        _compute(name, norms[name], settings),
        f"config.{name}",
        settings.normalization,
        own=(teacher.mean, teacher.std) if name == "teacher" else ((), ()),
    )
    network = dataclasses.replace(network, grouped=settings.group_views)
    if name != "teacher" and "head" in student.reuse and teacher.norm == "running":
        # BatchNorm in a reused head uses the teacher's statistics (disagreement R2).
        encoder = network.encoder.clone(head_norm="running")
        return dataclasses.replace(network, encoder=encoder)
    return network


def _spec(name: str, settings: MethodSettings) -> models.NetworkSpec:
    """Returns the description of a network; the momentum network has the student's."""
    return settings.teacher if name == "teacher" else settings.student


def _reused(settings: MethodSettings, method: Method) -> tuple[str, ...]:
    """Returns the parts of the teacher that the student reuses.

    Raises:
      UserError: if a part is unknown, no objective has a teacher, or the heads differ.
    """
    student, teacher = settings.student, settings.teacher
    for part in student.reuse:
        if part not in REUSABLE:
            raise errors.unknown("config.student.reuse", part, REUSABLE)
    if not student.reuse:
        return ()
    if "teacher" not in method.plan:
        raise errors.UserError(
            f"config.student.reuse={student.reuse}: no objective has a teacher whose "
            "head could be reused. Set config.objectives.distill.weight, or set reuse to ()."
        )
    if teacher.head == "none":
        raise errors.UserError(
            "config.student.reuse=('head',): the teacher has no head (config.teacher.head='none'). "
            "Use weights that include the projection head, or set reuse to ()."
        )
    heads = [(spec.head, spec.dim, spec.hidden, spec.layers) for spec in (student, teacher)]
    if heads[0] != heads[1] or not student.adapter:
        raise errors.UserError(
            f"config.student.reuse=('head',) copies the teacher's head: set config.student.head="
            f"{teacher.head}, dim={teacher.dim}, hidden={teacher.hidden}, layers={teacher.layers} "
            f"and adapter={models.width(teacher)}, or call teacher.resolve, which sets them."
        )
    return student.reuse


def _check_widths(objectives: Mapping[str, Objective], settings: MethodSettings) -> None:
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
        student_dim, teacher_dim = dim(settings.student), dim(settings.teacher, output)
        if student_dim == teacher_dim:
            continue
        if output == "embedding" and settings.teacher.head != "none":
            target = (
                f"config.teacher.dim={teacher_dim}: the student matches the teacher's embedding"
            )
        else:
            target = f"the {teacher_dim} features of the teacher, which the student matches"
        head = "--config.student.head=mlp " if settings.student.head == "none" else ""
        raise errors.UserError(
            f"config.student.dim={student_dim} must equal {target} (config.objectives.{name}). "
            f"Set {head}--config.student.dim={teacher_dim}."
        )


def dim(spec: models.NetworkSpec, output: str = "embedding") -> int:
    """Returns the width of a network's output.

    Args:
      spec: the network.
      output: an element of `OUTPUTS`.
    """
    if output == "features" or spec.head == "none":
        return models.width(spec)
    return spec.dim


def _row(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, size), jnp.float32)


def memory_bytes(method: Method, settings: MethodSettings) -> int:
    """Returns the bytes of the objectives' memory on each device.

    Sharded queues count with their size on all devices together.

    Args:
      method: result of `build(settings)`.
      settings: resolved, with the widths of the networks.
    """
    encoded = {}
    for name, views in method.plan.items():
        spec = _spec(name, settings)
        sizes = dim(spec, "features"), dim(spec), sum(spec.prototypes)
        encoded[name] = dict.fromkeys(views, jax.eval_shape(Encoded, *map(_row, sizes)))
    memory = jax.eval_shape(lambda: method.memory(jax.random.key(0), Record(encoded, {})))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(memory))
