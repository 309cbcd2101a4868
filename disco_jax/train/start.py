"""What a student starts from: the weights of a run, of an import or of a PyTorch file."""

import dataclasses
import logging
from typing import Any

import jax
import numpy as np

from disco_jax import convert, errors, models
from disco_jax.models.encoder import Encoder, Variables
from disco_jax.train import teacher

_LOG = logging.getLogger(__name__)

# `config.student.start`: what of the weights is taken; "all": with head, adapter and prototypes.
PARTS = ("backbone", "all")
# Of a backbone: what decides the shapes of its weights.
_FIELDS = "width", "stem", "grid", "patch"
_OF_HEADS = "adapter", "head", "hidden", "layers", "dim", "prototypes"


@dataclasses.dataclass(frozen=True)
class _Given:
    """A network to start from.

    Attributes:
      spec: the fields `teacher.SHAPE` of it.
      encoder: that they describe.
      variables: of it.
      normalisation: mean and standard deviation of the images that it was trained on, by channel.
    """

    spec: Any
    encoder: Encoder
    variables: Variables
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]


def check(spec: Any) -> None:
    """Refuses fields of `config.student` that contradict one another; reads no weights.

    Raises:
      UserError: see above.
    """
    if not spec.get("weights", ""):
        if spec.get("start", PARTS[0]) != PARTS[0] or spec.get("network", "student") != "student":
            raise errors.UserError(
                "config.student.start and .network say what to take of config.student.weights, "
                "which is empty: give weights, or leave both as they are."
            )
        return
    if spec.weights == teacher.RANDOM:
        raise errors.UserError(
            "config.student.weights='random': a student without weights starts so; leave it empty."
        )
    if spec.start not in PARTS:
        raise errors.unknown("config.student.start", spec.start, PARTS)
    if spec.network not in teacher.NETWORKS:
        raise errors.unknown("config.student.network", spec.network, teacher.NETWORKS)
    if spec.start == "all" and "head" in spec.reuse:
        raise errors.UserError(
            "config.student.start='all' and config.student.reuse=('head',) both decide the head: "
            "set config.student.start=backbone, or reuse=()."
        )


def load(config: Any, encoder: Encoder) -> Variables:
    """The parts of the student that `config.student.weights` gives.

    Args:
      config: of a pretraining run, resolved.
      encoder: the student's.

    Returns:
      {"params", "batch_stats"} of these parts alone.

    Raises:
      UserError: nothing there, nothing that is understood, or weights of another network.
    """
    spec, size = config.student, config.augment.size
    given = _given(spec, size)
    ours = jax.eval_shape(lambda: encoder.create(0, size))
    parts = ("backbone",) if spec.start == "backbone" else tuple(ours["params"])
    found, wanted = _only(given.variables, parts), _only(ours, parts)
    same = all(teacher.shape(given.spec)[f] == spec[f] for f in _names(spec.start))
    if not same or jax.tree.map(np.shape, found) != jax.tree.map(np.shape, wanted):
        raise errors.UserError(_differences(spec, given, encoder))
    own = tuple(config.augment.mean), tuple(config.augment.std)
    if given.normalisation != own:
        _LOG.warning(
            "The student starts from weights for images normalised by mean %s and std %s; "
            "config.augment.mean and .std are %s and %s.", *given.normalisation, *own
        )  # fmt: skip
    return found


def _given(spec: Any, size: int) -> _Given:
    path = teacher.place(spec.weights, "config.student.weights")
    if not path.is_dir():
        imported = convert.read_network(path)
        mean, std = imported.normalisation
        return _Given(
            imported.spec, imported.encoder, imported.variables, (tuple(mean), tuple(std))
        )
    from disco_jax.train import checkpoint  # half a second for what resolves a config

    config = teacher.read_config(path)
    encoder = models.build_encoder(config.student, setting=f"{path}: config.student")
    network = teacher.network_of(path, spec.network, "config.student.network")
    like = jax.eval_shape(lambda: encoder.create(0, size))
    variables, step = checkpoint.load(path, network, like)
    _LOG.info("The student starts from the %s of step %d of %s", network, step, path)
    augment = tuple(config.augment.mean), tuple(config.augment.std)
    return _Given(config.student, encoder, variables, augment)


def _only(variables: Variables, parts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {
        collection: {part: tree[part] for part in parts if part in tree}
        for collection, tree in variables.items()
    }


def _names(start: str) -> tuple[str, ...]:
    """Fields whose value says what is computed, whatever the shapes."""
    return ("backbone",) if start == "backbone" else ("backbone", "head")


def _differences(spec: Any, given: _Given, encoder: Encoder) -> str:
    """Says in one sentence what of the student is not as the weights have it."""
    theirs = teacher.shape(given.spec)
    pairs: list[tuple[str, Any, Any]] = [("backbone", spec.backbone, theirs["backbone"])]
    if spec.backbone == theirs["backbone"]:
        ours, other = vars(encoder.backbone), vars(given.encoder.backbone)
        pairs = [(name, ours.get(name), other.get(name)) for name in _FIELDS]
        if spec.start == "all":
            own = teacher.shape(spec)
            pairs += [(n, teacher.plain(own[n]), teacher.plain(theirs[n])) for n in _OF_HEADS]
    told = [
        f"config.student.{name}={own!r}, but they have {other!r}"
        for name, own, other in pairs
        if own != other and own != -1  # the hidden width that is the backbone's
    ]
    alone = "" if spec.start == "backbone" else " (config.student.start=backbone takes no head)"
    return f"config.student.weights={spec.weights!r} do not fit: {'; '.join(told)}{alone}."
