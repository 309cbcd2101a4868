"""Initial weights of a student, loaded from a run, an import or a PyTorch checkpoint."""

import dataclasses
import logging
from typing import Any

import jax
import numpy as np

from disco_jax import errors, models
from disco_jax.convert.load import read_network
from disco_jax.data.data_settings import AugmentSettings
from disco_jax.methods.method_settings import StudentSpec
from disco_jax.models.encoder import Encoder, Variables
from disco_jax.models.network_spec import NetworkSpec
from disco_jax.train import stored_settings, teacher

_LOG = logging.getLogger(__name__)

# Values of `config.student.start`; "all" loads all other parts too.
PARTS = ("backbone", "all")
# Fields that determine the shapes of the backbone's weights, and of all other weights.
_BACKBONE_FIELDS = "width", "stem", "grid", "patch"
_HEAD_FIELDS = "adapter", "head", "hidden", "layers", "dim", "prototypes", "predictor"


@dataclasses.dataclass(frozen=True)
class _Pretrained:
    """A network with trained weights.

    Attributes:
      spec: its description.
      encoder: the encoder of `spec`.
      variables: its {"params", "batch_stats"}.
      normalisation: per-channel mean and standard deviation of its training images.
    """

    spec: NetworkSpec
    encoder: Encoder
    variables: Variables
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]


def check(spec: StudentSpec) -> None:
    """Checks that the fields of `config.student` are consistent; reads no weights.

    Raises:
      UserError: the fields contradict each other or have unknown values.
    """
    if not spec.weights:
        if spec.start != PARTS[0] or spec.network != "student":
            raise errors.UserError(
                "config.student.start and config.student.network need config.student.weights, "
                "which is empty. Set the weights, or leave both fields at their defaults."
            )
        return
    if spec.weights == teacher.RANDOM:
        raise errors.UserError(
            "config.student.weights='random' is not supported. Leave it empty: the student then "
            "starts from random weights."
        )
    if spec.start not in PARTS:
        raise errors.unknown("config.student.start", spec.start, PARTS)
    if spec.network not in teacher.NETWORKS:
        raise errors.unknown("config.student.network", spec.network, teacher.NETWORKS)
    if spec.start == "all" and "head" in spec.reuse:
        raise errors.UserError(
            "config.student.start='all' and config.student.reuse=('head',) both set the head. Set "
            "config.student.start=backbone or config.student.reuse=()."
        )


def load(spec: StudentSpec, augment: AugmentSettings, encoder: Encoder) -> Variables:
    """Loads the parts of the student that come from `config.student.weights`.

    Args:
      spec: the student, resolved.
      augment: size and normalisation of the run's images.
      encoder: the student's encoder.

    Returns:
      {"params", "batch_stats"}, each with the loaded parts only.

    Raises:
      UserError: the weights do not exist, are not recognised or belong to another network.
    """
    size = augment.size
    pretrained = _pretrained(spec, size)
    student = jax.eval_shape(lambda: encoder.create(0, size))
    parts = ("backbone",) if spec.start == "backbone" else tuple(student["params"])
    loaded, expected = _only(pretrained.variables, parts), _only(student, parts)
    same = all(getattr(pretrained.spec, f) == getattr(spec, f) for f in _names(spec.start))
    if not same or jax.tree.map(np.shape, loaded) != jax.tree.map(np.shape, expected):
        raise errors.UserError(_differences(spec, pretrained, encoder))
    if pretrained.normalisation != augment.normalization:
        _LOG.warning(
            "The student starts from weights trained on images normalised by mean %s and std %s, "
            "but config.augment.mean and .std are %s and %s.",
            *pretrained.normalisation,
            *augment.normalization,
        )
    return loaded


def _pretrained(spec: StudentSpec, size: int) -> _Pretrained:
    """Reads the network that `config.student.weights` contains."""
    path = teacher.place(spec.weights, "config.student.weights")
    if not path.is_dir():
        imported = read_network(path)
        mean, std = imported.normalisation
        network_spec = teacher.spec_of(imported)
        return _Pretrained(
            network_spec, imported.encoder, imported.variables, (tuple(mean), tuple(std))
        )
    # Imported here because resolving a config does not need it and it takes half a second.
    from disco_jax.run import checkpoint

    stored = stored_settings.read(path)
    encoder = models.build_encoder(stored.student, setting=f"{path}: config.student")
    network = teacher.network_of(path, spec.network, "config.student.network")
    like = jax.eval_shape(lambda: encoder.create(0, size))
    variables, step = checkpoint.load(path, network, like)
    _LOG.info("The student starts from network %s at step %d of %s", network, step, path)
    return _Pretrained(stored.student, encoder, variables, stored.augment.normalization)


def _only(variables: Variables, parts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Selects parts of all collections."""
    return {
        collection: {part: tree[part] for part in parts if part in tree}
        for collection, tree in variables.items()
    }


def _names(start: str) -> tuple[str, ...]:
    """Returns the fields that must be equal because shapes do not determine them."""
    return ("backbone",) if start == "backbone" else ("backbone", "head")


def _differences(spec: StudentSpec, pretrained: _Pretrained, encoder: Encoder) -> str:
    """Returns the message for weights that belong to another network than the student."""
    actual = pretrained.spec
    pairs: list[tuple[str, Any, Any]] = [("backbone", spec.backbone, actual.backbone)]
    if spec.backbone == actual.backbone:
        student, other = vars(encoder.backbone), vars(pretrained.encoder.backbone)
        pairs = [(name, student.get(name), other.get(name)) for name in _BACKBONE_FIELDS]
        if spec.start == "all":
            pairs += [(name, getattr(spec, name), getattr(actual, name)) for name in _HEAD_FIELDS]
    differences = [
        f"config.student.{name}={configured!r}, but the weights have {stored!r}"
        for name, configured, stored in pairs
        if configured != stored and configured != -1  # -1: the backbone's own width
    ]
    hint = "" if spec.start == "backbone" else " (config.student.start=backbone loads no head)"
    return f"config.student.weights={spec.weights!r} do not fit: {'; '.join(differences)}{hint}."
