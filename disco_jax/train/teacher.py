"""The frozen teacher, loaded from a run of this package or from a PyTorch checkpoint."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from disco_jax import errors, methods, models, typed
from disco_jax.convert.load import Imported, locate, read_network
from disco_jax.methods.method_settings import StudentSpec, TeacherSpec
from disco_jax.models.encoder import Encoder, Variables
from disco_jax.models.network_spec import NetworkSpec
from disco_jax.ops.memory import Queue
from disco_jax.run import workdir
from disco_jax.train import stored_settings

_LOG = logging.getLogger(__name__)

RANDOM = "random"
# Value of `config.teacher.head`: take everything except the backbone's name from the weights.
AUTO = "auto"
# The fields that describe a network in a config.
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
    "predictor",
)
# Networks of a run that may serve as a teacher.
NETWORKS = ("student", "momentum")
# The queue of MoCo's keys, which the official checkpoint contains: view 1 is the key.
KEYS = "view_1"


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Frozen weights and the queue stored with them.

    Attributes:
      variables: {"params", "batch_stats"} of the encoder.
      queue: the queue of keys in the same checkpoint, if there is one (disagreement D3).
    """

    variables: Variables
    queue: Queue | None = None


def describe(weights: str) -> NetworkSpec:
    """Reads the description of the network in a run directory or a PyTorch checkpoint.

    Raises:
      UserError: the path does not exist or its contents are not recognised.
    """
    path = place(weights)
    if path.is_dir():
        return stored_settings.read(path).student
    return spec_of(read_network(path))


def spec_of(imported: Imported) -> NetworkSpec:
    """Returns the description of an imported network."""
    return typed.parse(NetworkSpec, imported.spec, "the checkpoint's", defaults=True)


def shape(spec: NetworkSpec) -> dict[str, Any]:
    """Returns the fields `SHAPE` of a description."""
    return {field: getattr(spec, field) for field in SHAPE}


def normalisation(weights: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Reads the per-channel mean and standard deviation with which weights were trained.

    Raises:
      UserError: the path does not exist or its contents are not recognised.
    """
    path = place(weights)
    if path.is_dir():
        return stored_settings.read(path).augment.normalization
    mean, std = read_network(path).normalisation
    return tuple(mean), tuple(std)


def resolve(
    student: StudentSpec, teacher: TeacherSpec, objectives: Mapping[str, Mapping[str, Any]]
) -> tuple[StudentSpec, TeacherSpec]:
    """Returns both networks with all fields filled in that depend on the teacher's weights.

    These are `config.teacher.head="auto"`, an empty `config.teacher.mean` and `.std`, and for the
    student `dim=0` and the fields of a reused head.

    Raises:
      UserError: the weights cannot be read, or have another backbone.
    """
    teacher = fill(teacher)
    return _fill_student(student, teacher, objectives), teacher


def fill(spec: TeacherSpec) -> TeacherSpec:
    """Fills in the head and the normalisation of `config.teacher` from its weights.

    Raises:
      UserError: see `resolve`.
    """
    has_file = spec.weights not in ("", RANDOM)
    if spec.head == AUTO and not has_file:
        spec = dataclasses.replace(spec, head="mlp")
    elif spec.head == AUTO:
        network = describe(spec.weights)
        if network.backbone != spec.backbone:
            raise errors.UserError(
                f"config.teacher.backbone={spec.backbone!r}, but {spec.weights} contains a "
                f"{network.backbone!r}. Set --config.teacher.backbone={network.backbone}."
            )
        spec = dataclasses.replace(spec, **shape(network))
    if has_file and not spec.mean and not spec.std:
        mean, std = normalisation(spec.weights)
        spec = dataclasses.replace(spec, mean=mean, std=std)
    return spec


def _fill_student(
    student: StudentSpec, teacher: TeacherSpec, objectives: Mapping[str, Mapping[str, Any]]
) -> StudentSpec:
    """Sets the student's head to the reused one, or `dim=0` to the width of its target."""
    if "head" in student.reuse and teacher.head != "none":
        return dataclasses.replace(
            student,
            head=teacher.head,
            hidden=teacher.hidden,
            layers=teacher.layers,
            dim=teacher.dim,
            adapter=models.width(teacher),
        )
    if student.dim == 0:
        copies_features = any(
            fields["weight"] and fields.get("teacher_output") == "features"
            for fields in objectives.values()
        )
        output = "features" if copies_features else "embedding"
        return dataclasses.replace(student, dim=methods.dim(teacher, output))
    return student


def load(spec: TeacherSpec, encoder: Encoder, size: int) -> Teacher:
    """Loads the teacher of a pretraining config.

    Args:
      spec: `config.teacher`, resolved; `weights` is the directory of a run or of an import, a
        PyTorch checkpoint, or "random".
      encoder: the encoder that `spec` describes.
      size: image size in px.

    Raises:
      UserError: the weights are not set, do not exist or belong to another network.
    """
    check_weights(spec)
    if spec.weights == RANDOM:
        _LOG.warning("The teacher has random weights: use this run only to try things out.")
        return Teacher(encoder.create(1, size))
    path = place(spec.weights)
    if path.is_dir():
        return _from_run(path, spec, encoder, size)
    imported = read_network(path)
    _check(spec_of(imported), spec, imported.encoder, encoder, path)
    return Teacher(imported.variables, imported.queue)


def check_weights(spec: TeacherSpec) -> None:
    """Checks that the weights of the teacher are set and exist.

    Raises:
      UserError: see `load`.
    """
    if not spec.weights:
        raise errors.UserError(
            "config.teacher.weights is empty. Set it to the workdir of a pretraining run or of an "
            "import, to a PyTorch checkpoint, or to 'random' to try things out."
        )
    if spec.weights != RANDOM:
        place(spec.weights)


def place(weights: str, setting: str = "config.teacher.weights") -> epath.Path:
    """Resolves a path to the directory of a run or of an import, or to a file with weights.

    Args:
      weights: path of such a directory, of a file, or of a folder with the index of a sharded
        checkpoint.
      setting: name of the config field, for messages.

    Raises:
      UserError: the path does not exist, or is a folder with the files of several networks.
    """
    path = epath.Path(weights)
    if not path.exists():
        raise errors.UserError(f"{setting}={weights!r} does not exist.")
    return path if (path / workdir.ENVIRONMENT).exists() else locate(path)


def _from_run(path: epath.Path, spec: TeacherSpec, encoder: Encoder, size: int) -> Teacher:
    # Imported here because `resolve` does not need them and they take half a second.
    from disco_jax.run import checkpoint
    from disco_jax.train import state

    stored = stored_settings.read(path)
    _check(stored.student, spec, models.build_encoder(stored.student), encoder, path)
    network = network_of(path, spec.network, "config.teacher.network")
    variables, step = checkpoint.load(path, network, encoder.create(0, size))
    _LOG.info("Teacher: network %s at step %d of %s", network, step, path)
    if not stored.objectives["contrast"]["weight"]:
        return Teacher(variables)
    method = methods.build(stored.method)
    record = state.shapes(method, (size,))
    abstract = jax.eval_shape(lambda: method.memory(jax.random.key(0), record))
    if KEYS not in abstract["contrast"]:
        return Teacher(variables)
    memory, _ = checkpoint.load(path, "memory", abstract)
    return Teacher(variables, memory["contrast"][KEYS])


def network_of(path: epath.Path, network: str, setting: str) -> str:
    """Returns the network of a run to load; falls back to the student if it has no other.

    Args:
      path: directory of the run or of the import; an import contains only a student.
      network: one of `NETWORKS`.
      setting: name of the config field, for messages.

    Raises:
      UserError: for an unknown network.
    """
    from disco_jax.run import checkpoint

    if network not in NETWORKS:
        raise errors.unknown(setting, network, NETWORKS)
    if network == "momentum" and not checkpoint.has(path, network):
        _LOG.warning("%s has no momentum network; its student is used instead.", path)
        return "student"
    return network


def _check(
    actual: NetworkSpec, spec: TeacherSpec, loaded: Encoder, encoder: Encoder, path: epath.Path
) -> None:
    """Checks that the weights belong to the network that the config describes.

    Args:
      actual: description of the network with the weights.
      spec: `config.teacher`.
      loaded: the encoder of `actual`.
      encoder: the encoder of `spec`.
      path: of the weights, for the message.

    Raises:
      UserError: lists the fields that differ.
    """

    def shapes(encoder: Encoder) -> Any:
        return jax.tree.map(lambda x: x.shape, jax.eval_shape(lambda: encoder.create(0, 32)))

    same_names = (actual.backbone, actual.head) == (spec.backbone, spec.head)
    if same_names and shapes(loaded) == shapes(encoder):
        return
    stored_shape = shape(actual)
    fields = [(name, value, stored_shape[name]) for name, value in shape(spec).items()]
    differing = [
        f"config.teacher.{field}={configured!r}, but the weights have {stored!r}"
        for field, configured, stored in fields
        if configured != stored
    ]
    raise errors.UserError(
        f"The network in {path} is not the one in the config:\n  " + "\n  ".join(differing)
    )
