"""What no method can work with, refused before anything is compiled."""

from collections.abc import Mapping
from typing import Any

from disco_jax import errors, models
from disco_jax.methods.base import NETWORKS, OUTPUTS, Method, Objective, Views
from disco_jax.methods.compress import Compress
from disco_jax.methods.distill import REDUCTIONS, Distill
from disco_jax.methods.swapped import Swapped

# A target of temperature 0 is one-hot, which only SEED's loss means anything by.
ONE_HOT = ("config.objectives.similarity", "teacher_temperature")

# Fields that divide.
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
    """Refuses objectives that contradict their settings, the data or the views.

    Args:
      method: its objectives and views; networks are not needed yet.
      config: of a pretraining run.

    Raises:
      UserError: with each setting, and what would do.
    """
    problems = errors.Problems()
    for name, objective in method.objectives.items():
        problems.attempt(_check_numbers, name, objective, config.batch_size)
        problems.attempt(_check_needs, name, objective, method.views)
        problems.attempt(_check_scores, name, objective, method.views, config.student)
        problems.attempt(_check_data, name, objective, config, len(method.views.locals))
    problems.raise_any()


def _check_numbers(name: str, objective: Objective, batch_size: int) -> None:
    """Refuses what would fail, or mean something else, inside the step."""
    setting = f"config.objectives.{name}"
    for field in POSITIVE:
        if getattr(objective, field, 1.0) <= 0 and (setting, field) != ONE_HOT:
            raise errors.UserError(f"{setting}.{field} must be above 0.")
    share = getattr(objective, "global_share", 0.0)
    if share > 1:
        raise errors.UserError(
            f"{setting}.global_share={share} must be a share in 0..1, or -1 to "
            "count every pair of views the same."
        )
    init = getattr(objective, "queue_init", "random")
    if init not in ("random", "teacher"):
        raise errors.unknown(f"{setting}.queue_init", init, ("random", "teacher"))
    if isinstance(objective, Distill) and objective.reduction not in REDUCTIONS:
        raise errors.unknown(f"{setting}.reduction", objective.reduction, REDUCTIONS)
    size = getattr(objective, "queue_size", None)
    if isinstance(objective, Compress):  # its anchors may wrap inside a batch
        if objective.queue_size < batch_size:
            raise errors.UserError(
                f"{setting}.queue_size={objective.queue_size} is below config.batch_size."
            )
    elif isinstance(objective, Swapped) and size == 0:
        return  # it works without
    elif size is not None and (size < 1 or size % batch_size):
        below = size // batch_size * batch_size
        nearest = [str(n) for n in (below, below + batch_size) if n > 0]
        raise errors.UserError(
            f"{setting}.queue_size={size} is not a multiple of the global batch "
            f"config.batch_size={batch_size}; the nearest that are: {', '.join(nearest)}."
        )


def _check_needs(name: str, objective: Objective, views: Views) -> None:
    """Refuses networks that do not exist and views that the recipe does not make."""
    for network, wanted in objective.needs(views).items():
        if network not in NETWORKS:
            raise errors.unknown(f"A network of config.objectives.{name}", network, NETWORKS)
        made = (*views.globals, *views.locals, *objective.makes)
        missing = sorted(set(wanted) - set(made))
        if missing:
            raise errors.UserError(
                f"config.objectives.{name} reads view {missing[0]} of the {network}, but the "
                f"recipe makes {len(views.globals + views.locals)}, counted from 0: raise "
                "config.views or config.local.count, or change the views of "
                f"config.objectives.{name}."
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


def _check_data(name: str, objective: Objective, config: Any, local_views: int) -> None:
    """Refuses an objective whose images, mixtures or maps of views there are not."""
    if objective.reads_maps and config.group_views:
        raise errors.UserError(
            f"config.objectives.{name} reads the feature maps of single views, but "
            "config.group_views=True passes views of all sizes through a network together: set "
            "config.group_views=False."
        )
    if (objective.members or objective.aux) and not config.bags.file:
        raise errors.UserError(
            f"config.objectives.{name} needs to know which images the teacher finds alike: "
            "make the bags with `disco-jax bags` and set config.bags.file."
        )
    if objective.makes and config.views > min(objective.makes):
        raise errors.UserError(
            f"config.views={config.views}, but view {min(objective.makes)} is what "
            f"config.objectives.{name} mixes: set config.views={min(objective.makes)}."
        )
    if objective.makes and local_views:
        raise errors.UserError(
            f"config.objectives.{name} mixes whole views (CutMix) and config.local.count="
            f"{local_views} asks for multi-crop: set config.local.count=0, or "
            f"config.objectives.{name}.cutmix=False."
        )


def check_widths(objectives: Mapping[str, Objective], config: Any) -> None:
    """Refuses a student whose embedding is not as wide as what of the teacher it is to match."""
    for name, objective in objectives.items():
        output = objective.matches()
        if output is None:
            continue
        if output not in OUTPUTS:
            raise errors.unknown(f"config.objectives.{name}.teacher_output", output, OUTPUTS)
        ours, theirs = dim(config.student), dim(config.teacher, output)
        if ours == theirs:
            continue
        if output == "embedding" and config.teacher.head != "none":
            what = f"config.teacher.dim={theirs}: the student copies the teacher's embedding"
        else:
            what = f"the {theirs} features of the teacher, which the student copies"
        headless = config.student.head == "none"
        remedy = (
            "Give the student a head, e.g. config.student.head=mlp" if headless else "Set"
        ) + f" --config.student.dim={theirs}"
        raise errors.UserError(
            f"config.student.dim={ours} must equal {what} (config.objectives.{name}). {remedy}."
        )


def dim(spec: Any, output: str = "embedding") -> int:
    """How wide an output of a network's part of a config is: a name in `OUTPUTS`."""
    if output == "features" or spec.head == "none":
        return models.width(spec)
    return spec.dim
