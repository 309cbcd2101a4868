"""Validation of a method's settings before anything is compiled."""

from collections.abc import Mapping
from typing import Any

from disco_jax import errors, models
from disco_jax.methods.base import NETWORKS, OUTPUTS, Method, Objective, Views
from disco_jax.methods.compress import Compress
from disco_jax.methods.regression import REDUCTIONS, Distill
from disco_jax.methods.swapped import Swapped

# Only SEED's loss accepts temperature 0, which makes the target one-hot.
ONE_HOT = ("config.objectives.similarity", "teacher_temperature")

# Fields that must be positive, because losses divide by them.
POSITIVE = (
    "temperature",
    "student_temperature",
    "teacher_temperature",
    "target_temperature",
    "momentum_temperature",
    "warmup_temperature",
    "epsilon",
    "iterations",
)


def check(method: Method, config: Any) -> None:
    """Checks objectives against their settings, the data and the views.

    Args:
      method: only its objectives and views are used.
      config: config of a pretraining run.

    Raises:
      UserError: if any setting is invalid; lists each one with its allowed values.
    """
    problems = errors.Problems()
    for name, objective in method.objectives.items():
        problems.attempt(_check_numbers, name, objective, config.batch_size)
        problems.attempt(_check_needs, name, objective, method.views)
        problems.attempt(_check_scores, name, objective, method.views, config.student)
        problems.attempt(_check_data, name, objective, config, len(method.views.locals))
    problems.raise_any()


def _check_numbers(name: str, objective: Objective, batch_size: int) -> None:
    """Checks values that would fail, or have another meaning, inside the step."""
    setting = f"config.objectives.{name}"
    for field in POSITIVE:
        if getattr(objective, field, 1.0) <= 0 and (setting, field) != ONE_HOT:
            raise errors.UserError(f"{setting}.{field} must be above 0.")
    share = getattr(objective, "global_share", 0.0)
    if share > 1:
        raise errors.UserError(
            f"{setting}.global_share={share} must be between 0 and 1, or -1 to weigh all pairs of "
            "views equally."
        )
    init = getattr(objective, "queue_init", "random")
    if init not in ("random", "teacher"):
        raise errors.unknown(f"{setting}.queue_init", init, ("random", "teacher"))
    if isinstance(objective, Distill) and objective.reduction not in REDUCTIONS:
        raise errors.unknown(f"{setting}.reduction", objective.reduction, REDUCTIONS)
    size = getattr(objective, "queue_size", None)
    if isinstance(objective, Compress):  # its pushes may wrap around the end of the queue
        if objective.queue_size < batch_size:
            raise errors.UserError(
                f"{setting}.queue_size={objective.queue_size} is below config.batch_size="
                f"{batch_size}. Set it to at least the batch size."
            )
    elif isinstance(objective, Swapped) and size == 0:
        return  # the queue is optional
    elif size is not None and (size < 1 or size % batch_size):
        below = size // batch_size * batch_size
        nearest = [str(n) for n in (below, below + batch_size) if n > 0]
        raise errors.UserError(
            f"{setting}.queue_size={size} is not a multiple of the global batch "
            f"config.batch_size={batch_size}; the nearest that are: {', '.join(nearest)}."
        )


def _check_needs(name: str, objective: Objective, views: Views) -> None:
    """Checks that the networks and views that the objective needs exist."""
    for network, needed in objective.needs(views).items():
        if network not in NETWORKS:
            raise errors.unknown(f"A network of config.objectives.{name}", network, NETWORKS)
        available = (*views.globals, *views.locals, *objective.synthetic_views)
        missing = sorted(set(needed) - set(available))
        if missing:
            raise errors.UserError(
                f"config.objectives.{name} reads view {missing[0]} of the {network}, but the "
                f"recipe creates {len(views.globals + views.locals)} views, numbered from 0. Raise "
                "config.views or config.local.count, or change the views of "
                f"config.objectives.{name}."
            )


def _check_scores(name: str, objective: Objective, views: Views, student: Any) -> None:
    """Checks that objectives on prototypes have one set of prototypes and at least two views."""
    if not objective.reads_scores:
        return
    if len(student.prototypes) != 1:
        raise errors.UserError(
            f"config.objectives.{name} reads the scores of one set of prototypes, but "
            f"config.student.prototypes={tuple(student.prototypes)!r}. Set for example "
            "--config.student.prototypes='(3000,)'."
        )
    if len((*views.globals, *views.locals)) < 2:
        raise errors.UserError(
            f"config.objectives.{name} compares at least two views, but the recipe creates one. "
            "Raise config.views or config.local.count."
        )


def _check_data(name: str, objective: Objective, config: Any, local_views: int) -> None:
    """Checks that the data provides the views, bags and feature maps that the objective needs."""
    if objective.reads_maps and config.group_views:
        raise errors.UserError(
            f"config.objectives.{name} reads the feature maps of single views, but "
            "config.group_views=True encodes several views in one pass. Set "
            "config.group_views=False."
        )
    if (objective.bag_views or objective.aux) and not config.bags.file:
        raise errors.UserError(
            f"config.objectives.{name} needs bags of similar images. Compute them with "
            "`disco-jax bags` and set config.bags.file."
        )
    if objective.synthetic_views and config.views > min(objective.synthetic_views):
        raise errors.UserError(
            f"config.views={config.views}, but config.objectives.{name} creates view "
            f"{min(objective.synthetic_views)} itself. Set "
            f"config.views={min(objective.synthetic_views)}."
        )
    if objective.synthetic_views and local_views:
        raise errors.UserError(
            f"config.objectives.{name}.cutmix=True does not support multi-crop (config.local.count="
            f"{local_views}). Set config.local.count=0 or config.objectives.{name}.cutmix=False."
        )


def check_widths(objectives: Mapping[str, Objective], config: Any) -> None:
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
