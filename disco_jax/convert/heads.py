"""Projection heads in state dicts: where they are, their layers, and which of ours is the same."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from disco_jax.models.heads import VARIANTS

State = Mapping[str, np.ndarray]

# What a head can be called, behind the network's prefix. What is learned with a projector comes
# before the layers that classify.
_ROOTS = (
    "projector",  # solo-learn, VICReg, Barlow Twins
    "projection_head.layers",  # Lightly
    "projection_head",  # SwAV
    "neck.mlp",  # OpenMMLab, for MoCo
    "neck",  # OpenMMLab
    "head.projection.mlp",
    "head.mlp",
    "head.linear",  # ReSSL, which numbers them without a dot
    "fc",
    "classifier",
    "head",
    "head.fc",
)
# Those that a classifier stands under, beside a projection head or instead of one.
_OF_CLASSIFIERS = ("fc", "classifier", "head", "head.fc")
# Projection heads are a multiple of so many numbers wide, counts of classes are not.
_MULTIPLE = 32
# Layers by kind: linear, BatchNorm, any other.
_LINEAR, _NORM, _OTHER = "LN?"


@dataclasses.dataclass(frozen=True)
class Head:
    """A projection head in a state dict.

    Attributes:
      root: what its keys start with, behind the network's prefix.
      linear: the names of its linear layers behind the root, in order; ("",) for a single one.
      norm: of its BatchNorm layers.
      prototypes: the names of the layers of prototypes behind the network's prefix.
      order: a letter a layer as they follow one another: L linear, N BatchNorm, ? another.
      classifiers: what the keys of layers that classify start with, behind the prefix.
    """

    root: str = ""
    linear: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()
    prototypes: tuple[str, ...] = ()
    order: str = ""
    classifiers: tuple[str, ...] = ()


def find(network: State, backbone: str = "", own: Sequence[str] = ()) -> Head:
    """The head of a network, and the classifiers beside it.

    Args:
      network: key behind the network's prefix -> array.
      backbone: what the backbone's keys start with; "": they are among the others.
      own: beginnings of keys under the name of a head that are the backbone's.
    """
    network = {k: v for k, v in network.items() if not k.startswith(tuple(own))} if own else network
    roots = (*_ROOTS, *(backbone + root for root in _OF_CLASSIFIERS)) if backbone else _ROOTS
    found, classifiers = Head(), []
    for root in roots:
        head = sequence(network, root)
        if not head.order:
            continue
        if _classifies(network, head, backbone):
            classifiers.append(root)
        elif not found.order and _LINEAR in head.order:
            found = head
    return dataclasses.replace(
        found, prototypes=_prototypes(network), classifiers=tuple(classifiers)
    )


def sequence(network: State, root: str) -> Head:
    """The layers under `root`, in the order of their numbers; `order` is "" if there are none."""
    if _kind_of_layer(network, root) == _LINEAR:
        return Head(root, ("",), order=_LINEAR)
    # OpenMMLab has fc0, bn0, fc1, ...; others 0, 1, 3, ...
    number = r"\d+" if root in ("", "head.linear") else r"\.(?:fc|bn)?\d+"
    pattern = re.compile(f"{re.escape(root)}({number})\\.(?:weight|running_mean)")
    names = {match[1] for key in network if (match := pattern.fullmatch(key))}
    ordered = sorted(names, key=_position)
    kinds = {name: _kind_of_layer(network, root + name) for name in ordered}
    return Head(
        root,
        tuple(name for name in ordered if kinds[name] == _LINEAR),
        tuple(name for name in ordered if kinds[name] == _NORM),
        order="".join(kinds.values()),
    )


def spec(network: State, tail: State, head: Head, family: str) -> dict[str, Any]:
    """head, hidden, layers, dim, prototypes and adapter of a head that `problem` has passed.

    Args:
      network: key behind the prefix of the head -> array.
      tail: the same behind that of the network, for its prototypes.
      head: found there.
      family: one of `recognise.FAMILIES`.
    """
    keys = ((f"{name}.weight_v", f"{name}.weight") for name in head.prototypes)
    counts = tuple(len(tail[normed] if normed in tail else tail[plain]) for normed, plain in keys)
    described = {"head": "none", "hidden": 0, "layers": 0, "dim": 128}
    if head.linear:
        kind, widths = _kind(head, family), _widths(network, head)
        usual = VARIANTS.get(kind, {}).get("layers", 2)
        hidden = 0 if len(widths) == 1 else widths[0]
        layers = 0 if kind == "regression" or not hidden else len(widths)
        described = {
            "head": kind,
            "hidden": hidden,
            "layers": 0 if layers == usual else layers,
            "dim": widths[-1],
        }
    return {**described, "prototypes": counts, "adapter": 0}


def problem(network: State, head: Head, family: str) -> str:
    """Why a head is none of ours: the rest of a sentence; "" if one of ours is the same."""
    if not head.order or not head.linear:
        return ""
    if _OTHER in head.order:
        return "has a layer that is neither linear nor BatchNorm"
    if not _kind(head, family):
        names = {_LINEAR: "linear", _NORM: "BatchNorm"}
        return f"is a sequence that no head here has: {', '.join(names[c] for c in head.order)}"
    hidden = _widths(network, head)[:-1]
    if len(set(hidden)) > 1 and _kind(head, family) != "regression":
        return f"has hidden layers of several widths: {', '.join(map(str, hidden))}"
    return ""


def defaults(state: State, start: str, head: Head) -> dict[str, float]:
    """Full key -> value of what layers of a head are made without, and ours have.

    A linear layer may have no bias before BatchNorm, which takes a mean away, or if none of the
    head's has one; a BatchNorm layer at the end may have neither scale nor bias.

    Args:
      state: full key -> array.
      start: the prefix of the head.
      head: found there.
    """
    found: dict[str, float] = {}
    names = iter(head.linear)
    biased = any(f"{start}{head.root}{name}.bias" in state for name in head.linear)
    for layer, after in itertools.pairwise(f"{head.order} "):
        if layer != _LINEAR:
            continue
        key = f"{start}{head.root}{next(names)}.bias"
        if key not in state and (after == _NORM or not biased):
            found[key] = 0.0
    if head.order.endswith(_NORM):
        weight, bias = (f"{start}{head.root}{head.norm[-1]}.{leaf}" for leaf in ("weight", "bias"))
        if weight not in state and bias not in state:
            found |= {weight: 1.0, bias: 0.0}
    return found


def is_class_count(width: int) -> bool:
    """Whether a single layer so wide is taken for a classifier, not for a projection head."""
    return width % _MULTIPLE > 0


def _position(name: str) -> tuple[int, bool]:
    """Sorts fc0, bn0, fc1 and 0, 1, 3 as they follow one another."""
    return int(re.sub(r"\D", "", name)), "bn" in name


def _kind_of_layer(network: State, name: str) -> str:
    weight = network.get(f"{name}.weight" if name else "weight")
    if weight is not None and weight.ndim == 2 and weight.size:
        return _LINEAR
    plain = weight is None or weight.ndim == 1
    return _NORM if plain and np.ndim(network.get(f"{name}.running_mean", 0)) == 1 else _OTHER


def _classifies(network: State, head: Head, backbone: str) -> bool:
    """Whether layers are a classifier, not a projection head."""
    name = head.root.removeprefix(backbone)
    if backbone and head.root == "classifier":
        return True  # one that looks at the backbone from outside
    if name not in _OF_CLASSIFIERS or head.order != _LINEAR:
        return False
    return is_class_count(*_widths(network, head))


def _widths(network: State, head: Head) -> list[int]:
    """What each linear layer makes, in order."""
    return [len(network[f"{head.root}{name}.weight"]) for name in head.linear]


def _prototypes(network: State) -> tuple[str, ...]:
    return tuple(_prototype_layers(network))


def _prototype_layers(network: State) -> Iterator[str]:
    if np.ndim(network.get("head.last_layer.weight_v", 0)) == 2:
        yield "head.last_layer"
        return
    for single in ("prototypes", "head.prototypes"):
        if np.ndim(network.get(f"{single}.weight", 0)) == 2:
            yield single
            return
    pattern = re.compile(r"(prototypes\.prototypes\d+)\.weight")
    found = {m[1]: v for key, v in network.items() if (m := pattern.fullmatch(key))}
    yield from sorted(name for name, array in found.items() if array.ndim == 2)


def _kind(head: Head, family: str) -> str:
    """The name of the head of ours with the same layers; "": there is none."""
    order, layers = head.order, len(head.linear)
    if order == "LNLLNL":
        return "regression"
    plain, normed = re.fullmatch("L+", order), re.fullmatch("(LN)+L", order)
    if head.root == "head.mlp" and layers > 2:  # DINO's, with GELU
        return "dino" if plain else "dino_bn" if normed else ""
    # SwAV's networks end on the unit sphere, inside DisCo's checkpoints too; SimCLR's in SEED do.
    swav = head.root in ("projection_head", "head.projection.mlp") and family != "lightly"
    unit = swav or bool(head.prototypes) or family == "simclr"
    if plain:
        return "mlp_unit" if unit else "mlp"
    if normed:
        return "swav" if unit else "mlp_bn"
    return "mlp_bn_all" if re.fullmatch("(LN)+", order) and not unit else ""
