"""Methods from configs: the objectives whose weight is not 0, and the networks they need."""

import dataclasses
from typing import Any

from disco_jax import errors, models
from disco_jax.methods import distill
from disco_jax.methods.base import NETWORKS, Method, Objective, Views
from disco_jax.methods.contrast import Contrast
from disco_jax.methods.distill import Distill
from disco_jax.methods.self_distill import SelfDistill
from disco_jax.methods.similarity import Similarity
from disco_jax.methods.swapped import Swapped

OBJECTIVES: dict[str, type[Objective]] = {
    "contrast": Contrast,
    "distill": Distill,
    "similarity": Similarity,
    "swapped": Swapped,
    "self_distill": SelfDistill,
}

# Fields that divide.
POSITIVE = (
    "temperature",
    "student_temperature",
    "teacher_temperature",
    "momentum_temperature",
    "warmup_temperature",
    "epsilon",
    "iterations",
)


def build(config: Any, views: int = 2, local_views: int = 0, steps_per_epoch: int = 1) -> Method:
    """The method that a config's `objectives`, `student`, `momentum` and `teacher` describe.

    Args:
      config: a pretraining config; see `configs/common.py`.
      views: how many global views the recipe makes, numbered from 0.
      local_views: how many local ones, numbered after them.
      steps_per_epoch: for the objectives' durations in epochs.

    Raises:
      UserError: when no objective is left, or the settings contradict one another.
    """
    objectives = {
        name: _objective(name, fields, steps_per_epoch)
        for name, fields in config.objectives.items()
        if fields["weight"]
    }
    if not objectives:
        raise errors.UserError(
            "Every objective has weight 0, so there is nothing to learn from. Set one of "
            + ", ".join(f"config.objectives.{name}.weight" for name in config.objectives)
            + "."
        )
    numbers = tuple(range(views + local_views))
    method = Method({}, objectives, Views(numbers[:views], numbers[views:]))
    for name, objective in objectives.items():
        _check(name, objective, config.batch_size)
        _check_needs(name, objective, method.views)
        _check_scores(name, objective, method.views, config.student)
    networks = {name: _network(name, config) for name in method.plan}
    if "teacher" in networks and not getattr(objectives.get("distill"), "teacher_unit", True):
        networks["teacher"] = _raw(networks["teacher"])
    if "teacher" in networks and config.teacher.dim != config.student.dim:
        raise errors.UserError(
            f"config.student.dim={config.student.dim} must equal config.teacher.dim="
            f"{config.teacher.dim}: the student copies the teacher's embedding. Set "
            f"--config.student.dim={config.teacher.dim}."
        )
    return Method(networks, objectives, method.views)


def _objective(name: str, fields: Any, steps_per_epoch: int) -> Objective:
    objective = OBJECTIVES[name](**fields)
    if hasattr(objective, "steps_per_epoch"):
        return dataclasses.replace(objective, steps_per_epoch=steps_per_epoch)
    return objective


def _raw(network: models.Network) -> models.Network:
    """A network whose head does not scale the embedding to length 1."""
    head = network.encoder.head
    if not network.encoder.normalised():
        return network
    encoder = network.encoder.clone(head=head.clone(unit=False))
    return dataclasses.replace(network, encoder=encoder)


def _network(name: str, config: Any) -> models.Network:
    # The momentum network is the student with other statistics.
    spec = config.teacher if name == "teacher" else config.student
    network = models.build_network(spec, config[name].norm, config.dtype, f"config.{name}")
    return dataclasses.replace(network, grouped=config.get("group_views", False))


def _check_needs(name: str, objective: Objective, views: Views) -> None:
    """Refuses networks that do not exist and views that the recipe does not make."""
    for network, wanted in objective.needs(views).items():
        if network not in NETWORKS:
            raise errors.unknown(f"A network of config.objectives.{name}", network, NETWORKS)
        made = (*views.globals, *views.locals)
        missing = sorted(set(wanted) - set(made))
        if missing:
            raise errors.UserError(
                f"config.objectives.{name} reads view {missing[0]} of the {network}, but the "
                f"recipe makes {len(made)}, counted from 0: raise config.views or "
                f"config.local.count, or change the views of config.objectives.{name}."
            )


def _check_scores(name: str, objective: Objective, views: Views, student: Any) -> None:
    """Refuses objectives on prototypes without prototypes, or without a pair of views."""
    if not getattr(objective, "reads_scores", False):
        return
    if len(student.prototypes) != 1:
        raise errors.UserError(
            f"config.objectives.{name} reads the scores of one set of prototypes, but "
            f"config.student.prototypes={tuple(student.prototypes)!r}: set for instance "
            "--config.student.prototypes='(3000,)'."
        )
    if len((*views.globals, *views.locals)) < 2:
        raise errors.UserError(
            f"config.objectives.{name} compares views, but the recipe makes one: raise "
            "config.views or config.local.count."
        )


def _check(name: str, objective: Objective, batch_size: int) -> None:
    """Refuses what would fail, or mean something else, inside the step."""
    setting = f"config.objectives.{name}"
    for field in POSITIVE:
        if getattr(objective, field, 1.0) <= 0:
            raise errors.UserError(f"{setting}.{field} must be above 0.")
    if getattr(objective, "global_share", 0.0) > 1:
        raise errors.UserError(
            f"{setting}.global_share={objective.global_share} must be a share in 0..1, or -1 to "
            "count every pair of views the same."
        )
    init = getattr(objective, "queue_init", "random")
    if init not in ("random", "teacher"):
        raise errors.unknown(f"{setting}.queue_init", init, ("random", "teacher"))
    if isinstance(objective, Distill) and objective.reduction not in distill.REDUCTIONS:
        raise errors.unknown(f"{setting}.reduction", objective.reduction, distill.REDUCTIONS)
    size = getattr(objective, "queue_size", None)
    if isinstance(objective, Swapped) and size == 0:
        return  # it works without
    if size is not None and (size < 1 or size % batch_size):
        below = size // batch_size * batch_size
        nearest = [str(n) for n in (below, below + batch_size) if n > 0]
        raise errors.UserError(
            f"{setting}.queue_size={size} is not a multiple of the global batch "
            f"config.batch_size={batch_size}; the nearest that are: {', '.join(nearest)}."
        )
