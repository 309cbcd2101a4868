"""Methods from configs: the objectives whose weight is not 0, and the networks they need."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from disco_jax import errors, models
from disco_jax.methods import checks
from disco_jax.methods.attention import Attention
from disco_jax.methods.bags import Bags
from disco_jax.methods.base import Method, Objective, Record, Views
from disco_jax.methods.binary import BinaryContrast
from disco_jax.methods.checks import dim
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
from disco_jax.ops.bank import Reading

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


def build(config: Any, views: int = 2, local_views: int = 0) -> Method:
    """The method that a config's `objectives`, `student`, `momentum` and `teacher` describe.

    Args:
      config: a pretraining config; see `configs/common.py`.
      views: how many global views the recipe makes, numbered from 0.
      local_views: how many local ones, numbered after them.

    Raises:
      UserError: when no objective is left, or the settings contradict one another.
    """
    method = _planned(config, views, local_views)
    objectives = method.objectives
    checks.check(method, config)
    reuse = _reused(config, method)
    networks = {name: _network(name, config) for name in method.plan}
    if "teacher" in networks and not getattr(objectives.get("distill"), "teacher_unit", True):
        networks["teacher"] = _raw(networks["teacher"])
    checks.check_widths(objectives, config)
    return Method(networks, objectives, method.views, reuse)


def check(config: Any) -> None:
    """Refuses objectives that `build` would refuse, whatever the networks are.

    Raises:
      UserError: see `build`.
    """
    checks.check(_planned(config, config.views, config.local.count), config)


def _planned(config: Any, views: int, local_views: int) -> Method:
    """The method without its networks."""
    objectives = _quick(_objectives(config), config)
    if not objectives:
        raise errors.UserError(
            "Every objective has weight 0, so there is nothing to learn from. Set one of "
            + ", ".join(f"config.objectives.{name}.weight" for name in config.objectives)
            + "."
        )
    numbers = tuple(range(views + local_views))
    return Method({}, objectives, Views(numbers[:views], numbers[views:]))


def plan(config: Any) -> dict[str, tuple[int, ...]]:
    """`Method.plan` of a config that need not be complete yet."""
    views = tuple(range(config.views + config.local.count))
    known = Views(views[: config.views], views[config.views :])
    return Method({}, _objectives(config), known).plan


def _objectives(config: Any) -> dict[str, Objective]:
    made, problems = {}, errors.Problems()
    for name, given in config.objectives.items():
        if given["weight"]:
            made[name] = problems.attempt(_objective, name, _tuples(given))
    problems.raise_any()
    return {name: objective for name, objective in made.items() if objective is not None}


def _objective(name: str, given: dict[str, Any]) -> Objective:
    """An objective from its part of a config."""
    if name not in OBJECTIVES:
        raise errors.unknown("The objective of config.objectives", name, OBJECTIVES)
    known = [field.name for field in dataclasses.fields(OBJECTIVES[name])]
    for field in given:
        if field not in known:
            raise errors.unknown(f"The field of config.objectives.{name}", field, known)
    return OBJECTIVES[name](**given)


def _quick(objectives: dict[str, Objective], config: Any) -> dict[str, Objective]:
    """Objectives that read and keep their queues as the config's `fast` has it."""
    quick = _fast(config, "losses", True)
    reading = Reading(quick, models.compute_dtype(config.dtype) if quick else jnp.float32)
    given = {
        "reading": reading,
        "half": _fast(config, "half_queue", False),
        "shared": config.batch_size if _fast(config, "shard_queue", False) else 0,
    }
    return {
        name: dataclasses.replace(o, **{k: v for k, v in given.items() if hasattr(o, k)})
        for name, o in objectives.items()
    }


def _fast(config: Any, field: str, default: Any) -> Any:
    """A field of `config.fast`, which configs of earlier versions do not have."""
    return config.get("fast", {}).get(field, default)


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
    encoder = network.encoder.clone(head=head.clone(l2_normalized=False))
    return dataclasses.replace(network, encoder=encoder)


def _network(name: str, config: Any) -> models.Network:
    # The momentum network is the student with other statistics.
    spec = config.teacher if name == "teacher" else config.student
    compute = models.Compute.from_config(config, name)
    augment = tuple(config.augment.mean), tuple(config.augment.std)
    network = models.build_network(spec, config[name].norm, compute, f"config.{name}", augment)
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
        [spec.get(f, 0) for f in ("head", "dim", "hidden", "layers")]
        for spec in (config.student, config.teacher)
    )
    if ours != theirs or not config.student.adapter:
        raise errors.UserError(
            f"config.student.reuse=('head',) takes the teacher's head: set config.student.head="
            f"{theirs[0]}, dim={theirs[1]}, hidden={theirs[2]}, layers={theirs[3]} and adapter="
            f"{models.width(config.teacher)}, or call teacher.resolve, which does."
        )
    return tuple(config.student.reuse)


def _row(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, size), jnp.float32)


def memory_bytes(method: Method, config: Any) -> int:
    """Bytes that the objectives remember from step to step, on every device.

    Of queues that devices share, on all of them together.

    Args:
      method: what `build` made of `config`.
      config: resolved: the widths of its networks are known.
    """
    encoded = {}
    for name, views in method.plan.items():
        spec = config.teacher if name == "teacher" else config.student
        sizes = dim(spec, "features"), dim(spec), sum(spec.prototypes)
        encoded[name] = dict.fromkeys(views, jax.eval_shape(Encoded, *map(_row, sizes)))
    memory = jax.eval_shape(lambda: method.memory(jax.random.key(0), Record(encoded, {})))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(memory))
