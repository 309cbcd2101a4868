"""Methods from configs: the objectives whose weight is not 0, and the networks they need."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from disco_jax import errors, models
from disco_jax.methods import distill
from disco_jax.methods.attention import Attention
from disco_jax.methods.bags import Bags
from disco_jax.methods.base import NETWORKS, OUTPUTS, Method, Objective, Record, Views
from disco_jax.methods.binary import BinaryContrast
from disco_jax.methods.clusters import OnlineClusters, PseudoLabels
from disco_jax.methods.compress import Compress
from disco_jax.methods.consistency import Consistency
from disco_jax.methods.contrast import Contrast
from disco_jax.methods.distill import Distill
from disco_jax.methods.relations import Relations
from disco_jax.methods.self_distill import SelfDistill
from disco_jax.methods.similarity import Similarity
from disco_jax.methods.swapped import Swapped
from disco_jax.models.encoder import Encoded

OBJECTIVES: dict[str, type[Objective]] = {
    "contrast": Contrast,
    "distill": Distill,
    "similarity": Similarity,
    "relations": Relations,
    "attention": Attention,
    "compress": Compress,
    "bags": Bags,
    "consistency": Consistency,
    "pseudo_labels": PseudoLabels,
    "online_clusters": OnlineClusters,
    "binary_contrast": BinaryContrast,
    "swapped": Swapped,
    "self_distill": SelfDistill,
}
REUSABLE = ("head",)
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


def build(config: Any, views: int = 2, local_views: int = 0) -> Method:
    """The method that a config's `objectives`, `student`, `momentum` and `teacher` describe.

    Args:
      config: a pretraining config; see `configs/common.py`.
      views: how many global views the recipe makes, numbered from 0.
      local_views: how many local ones, numbered after them.

    Raises:
      UserError: when no objective is left, or the settings contradict one another.
    """
    objectives = {
        name: OBJECTIVES[name](**_tuples(fields))
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
    _check_data(objectives, config, local_views)
    reuse = _reused(config, method)
    networks = {name: _network(name, config) for name in method.plan}
    if "teacher" in networks and not getattr(objectives.get("distill"), "teacher_unit", True):
        networks["teacher"] = _raw(networks["teacher"])
    _check_widths(objectives, config)
    return Method(networks, objectives, method.views, reuse)


def _tuples(fields: Any) -> dict[str, Any]:
    """Fields with tuples for lists, which is what comes back from JSON."""

    def fixed(value: Any) -> Any:
        return tuple(map(fixed, value)) if isinstance(value, (list, tuple)) else value

    return {name: fixed(value) for name, value in fields.items()}


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
    augment = tuple(config.augment.mean), tuple(config.augment.std)
    network = models.build_network(spec, config[name].norm, config.dtype, f"config.{name}", augment)
    network = dataclasses.replace(network, grouped=config.group_views)
    if name != "teacher" and "head" in config.student.reuse and config.teacher.norm == "running":
        # BatchNorm in a reused head keeps the teacher's statistics (disagreement R2).
        encoder = network.encoder.clone(head_norm="running")
        return dataclasses.replace(network, encoder=encoder)
    return network


def _reused(config: Any, method: Method) -> tuple[str, ...]:
    """The parts of the teacher that the student reuses; refuses what cannot be."""
    for part in config.student.reuse:
        if part not in REUSABLE:
            raise errors.unknown("config.student.reuse", part, REUSABLE)
    if not config.student.reuse:
        return ()
    if "teacher" not in method.plan:
        raise errors.UserError(
            f"config.student.reuse={tuple(config.student.reuse)}: no objective has a teacher whose "
            "head could be reused. Give config.objectives.distill a weight, or leave reuse at ()."
        )
    if config.teacher.head == "none":
        raise errors.UserError(
            "config.student.reuse=('head',): the teacher has no head (config.teacher.head='none'). "
            "Take weights with their projection head, or leave reuse at ()."
        )
    ours, theirs = (
        [spec[f] for f in ("head", "dim", "hidden")] for spec in (config.student, config.teacher)
    )
    if ours != theirs or not config.student.adapter:
        raise errors.UserError(
            f"config.student.reuse=('head',) takes the teacher's head: set config.student.head="
            f"{theirs[0]}, dim={theirs[1]}, hidden={theirs[2]} and adapter="
            f"{models.width(config.teacher)}, or call teacher.resolve, which does."
        )
    return tuple(config.student.reuse)


def _check_widths(objectives: dict[str, Objective], config: Any) -> None:
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


def memory_bytes(method: Method, config: Any) -> int:
    """Bytes that the objectives remember from step to step, on every device.

    Args:
      method: what `build` made of `config`.
      config: resolved: the widths of its networks are known.
    """
    encoded = {}
    for name, views in method.plan.items():
        spec = config.teacher if name == "teacher" else config.student
        sizes = dim(spec, "features"), dim(spec), sum(spec.prototypes)
        out = Encoded(*(jax.ShapeDtypeStruct((1, size), jnp.float32) for size in sizes))
        encoded[name] = dict.fromkeys(views, out)
    memory = jax.eval_shape(lambda: method.memory(jax.random.key(0), Record(encoded, {})))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(memory))


def _check_data(objectives: dict[str, Objective], config: Any, local_views: int) -> None:
    """Refuses objectives whose images, mixtures or maps of views there are not."""
    for name, objective in objectives.items():
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


def _check(name: str, objective: Objective, batch_size: int) -> None:
    """Refuses what would fail, or mean something else, inside the step."""
    setting = f"config.objectives.{name}"
    for field in POSITIVE:
        if getattr(objective, field, 1.0) <= 0 and (setting, field) != ONE_HOT:
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
    if isinstance(objective, Compress):  # its anchors may wrap inside a batch
        if size < batch_size:
            raise errors.UserError(f"{setting}.queue_size={size} is below config.batch_size.")
    elif isinstance(objective, Swapped) and size == 0:
        return  # it works without
    elif size is not None and (size < 1 or size % batch_size):
        below = size // batch_size * batch_size
        nearest = [str(n) for n in (below, below + batch_size) if n > 0]
        raise errors.UserError(
            f"{setting}.queue_size={size} is not a multiple of the global batch "
            f"config.batch_size={batch_size}; the nearest that are: {', '.join(nearest)}."
        )
