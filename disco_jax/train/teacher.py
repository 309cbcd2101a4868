"""The frozen teacher: from a run of this package or from a PyTorch checkpoint."""

import dataclasses
import logging
from typing import Any

import jax
from etils import epath

from disco_jax import convert, errors, methods, models
from disco_jax.models.encoder import Encoder, Variables
from disco_jax.ops.memory import Queue
from disco_jax.train import workdir

_LOG = logging.getLogger(__name__)

RANDOM = "random"
# `config.teacher.head`: everything but the backbone's name is taken from the weights.
AUTO = "auto"
# What describes a network in a config.
SHAPE = (
    "backbone",
    "width",
    "stem",
    "grid",
    "patch",
    "adapter",
    "head",
    "hidden",
    "layers",
    "dim",
    "prototypes",
)
_LATER = "patch", "layers"  # fields that not all versions had
# Of a run: what may teach.
NETWORKS = ("student", "momentum")
# The bank of MoCo's keys, which the official file carries: view 1 is the key.
KEYS = "view_1"


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Frozen weights.

    Attributes:
      variables: {"params", "batch_stats"} of the encoder.
      queue: the queue of keys that was saved with them, if there is one (disagreement D3).
    """

    variables: Variables
    queue: Queue | None = None


def describe(weights: str) -> dict[str, Any]:
    """The fields `SHAPE` of the network in a run's directory or a PyTorch checkpoint.

    Raises:
      UserError: nothing there, or nothing that is understood.
    """
    path = place(weights)
    if path.is_dir():
        return shape(read_config(path).student)
    return shape(convert.read_network(path).spec)


def shape(spec: Any) -> dict[str, Any]:
    """The fields `SHAPE`; runs of earlier versions lack some, which are 0 then."""
    return {field: spec.get(field, 0) if field in _LATER else spec[field] for field in SHAPE}


def normalisation(weights: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the images that weights were trained on, by channel.

    Raises:
      UserError: nothing there, or nothing that is understood.
    """
    path = place(weights)
    if path.is_dir():
        augment = read_config(path).augment
        return tuple(augment.mean), tuple(augment.std)
    mean, std = convert.read_network(path).normalisation
    return tuple(mean), tuple(std)


def resolve(config: Any) -> Any:
    """A copy of a pretraining config in which what the teacher decides has been filled in.

    `config.teacher.head="auto"`, `config.teacher.mean` and `.std` that are (), and of the student
    `dim=0` and the head that it reuses.

    Raises:
      UserError: the weights cannot be read, or are of another backbone.
    """
    config = config.copy_and_resolve_references()
    fill(config.teacher)
    _follow(config)
    return config


def fill(spec: Any) -> None:
    """Writes into `config.teacher` what its weights decide: the head, the normalisation.

    Raises:
      UserError: see `resolve`.
    """
    known = spec.weights not in ("", RANDOM)
    if spec.head == AUTO:
        found = describe(spec.weights) if known else {"head": "mlp", "backbone": spec.backbone}
        if found["backbone"] != spec.backbone:
            raise errors.UserError(
                f"config.teacher.backbone={spec.backbone!r}, but {spec.weights} holds a "
                f"{found['backbone']!r}: set --config.teacher.backbone={found['backbone']}."
            )
        spec.update(found)
    if known and not spec.mean and not spec.std:
        spec.mean, spec.std = normalisation(spec.weights)


def _follow(config: Any) -> None:
    """Gives the student the head that it reuses, or the width of what it copies."""
    student, spec = config.student, config.teacher
    if "head" in student.reuse and spec.head != "none":
        student.update({field: spec[field] for field in ("head", "hidden", "layers", "dim")})
        student.adapter = models.width(spec)
    elif student.dim == 0:
        copies_features = any(
            fields.weight and fields.get("teacher_output") == "features"
            for fields in config.objectives.values()
        )
        student.dim = methods.dim(spec, "features" if copies_features else "embedding")


def load(spec: Any, encoder: Encoder, size: int) -> Teacher:
    """The teacher that `config.teacher` names.

    Args:
      spec: `config.teacher`, resolved; `weights` is the directory of a run or of an import, a
        PyTorch checkpoint, or "random".
      encoder: what `spec` describes.
      size: of the images in px.

    Raises:
      UserError: no weights given, nothing there, or weights of another network.
    """
    check_weights(spec)
    if spec.weights == RANDOM:
        _LOG.warning("The teacher is random: this run tries things out, nothing more.")
        return Teacher(encoder.create(1, size))
    path = place(spec.weights)
    if path.is_dir():
        return _from_run(path, spec, encoder, size)
    imported = convert.read_network(path)
    _check(imported.spec, spec, imported.encoder, encoder, path)
    return Teacher(imported.variables, imported.queue)


def check_weights(spec: Any) -> None:
    """Refuses a teacher without weights, or whose weights are not there.

    Raises:
      UserError: see `load`.
    """
    if not spec.weights:
        raise errors.UserError(
            "config.teacher.weights is empty: the teacher has nothing to teach. Give the workdir "
            "of a pretraining run or of an import, a checkpoint in PyTorch's format, or 'random' "
            "to try things out."
        )
    if spec.weights != RANDOM:
        place(spec.weights)


def place(weights: str, setting: str = "config.teacher.weights") -> epath.Path:
    """The directory of a run or of an import, or the file with weights that a path names.

    Args:
      weights: the path: of such a directory, of a file, or of a folder with the index of several.
      setting: where it stands in the config, for messages.

    Raises:
      UserError: there is nothing.
    """
    path = epath.Path(weights)
    if not path.exists():
        raise errors.UserError(f"{setting}={weights!r} does not exist.")
    return path if (path / workdir.ENVIRONMENT).exists() else convert.locate(path)


def read_config(path: epath.Path) -> Any:
    """The config of a pretraining run or of an import.

    Raises:
      UserError: the directory is of something else.
    """
    config = workdir.read_config(path)
    if "student" not in config or "augment" not in config:
        raise errors.UserError(f"{path} is not the directory of a pretraining run or of an import.")
    return config


def _from_run(path: epath.Path, spec: Any, encoder: Encoder, size: int) -> Teacher:
    from disco_jax.train import checkpoint, state  # half a second for what resolves a config

    config = read_config(path)
    _check(config.student, spec, models.build_encoder(config.student), encoder, path)
    network = network_of(path, spec.network, "config.teacher.network")
    variables, step = checkpoint.load(path, network, encoder.create(0, size))
    _LOG.info("Teacher: %s of step %d of %s", network, step, path)
    if not config.objectives.contrast.weight:
        return Teacher(variables)
    method = methods.build(config, config.views, config.local.count)
    record = state.shapes(method, (size,))
    abstract = jax.eval_shape(lambda: method.memory(jax.random.key(0), record))
    if KEYS not in abstract["contrast"]:
        return Teacher(variables)
    memory, _ = checkpoint.load(path, "memory", abstract)
    return Teacher(variables, memory["contrast"][KEYS])


def network_of(path: epath.Path, wanted: str, setting: str) -> str:
    """The network of a run to take; an import holds one alone, its student.

    Args:
      path: of the run.
      wanted: one of `NETWORKS`.
      setting: where it stands in the config, for messages.

    Raises:
      UserError: for another name.
    """
    from disco_jax.train import checkpoint

    if wanted not in NETWORKS:
        raise errors.unknown(setting, wanted, NETWORKS)
    if wanted == "momentum" and not checkpoint.has(path, wanted):
        _LOG.warning("%s holds no momentum network; its student is taken.", path)
        return "student"
    return wanted


def _check(found: Any, spec: Any, theirs: Encoder, ours: Encoder, path: epath.Path) -> None:
    """Refuses weights of another network than the config describes."""

    def shapes(encoder: Encoder) -> Any:
        return jax.tree.map(lambda x: x.shape, jax.eval_shape(lambda: encoder.create(0, 32)))

    names = ("backbone", "head")
    if all(found[name] == spec[name] for name in names) and shapes(theirs) == shapes(ours):
        return
    found, spec = shape(found), shape(spec)
    fields = [(field, plain(spec[field]), plain(found[field])) for field in SHAPE]
    differing = [
        f"config.teacher.{field}={ours!r}, but the weights have {theirs!r}"
        for field, ours, theirs in fields
        if ours != theirs
    ]
    raise errors.UserError(
        f"The network in {path} is not the one described:\n  " + "\n  ".join(differing)
    )


def plain(value: Any) -> Any:
    """A field as it is in a config; what comes from JSON has lists for tuples."""
    return tuple(value) if isinstance(value, list) else value
