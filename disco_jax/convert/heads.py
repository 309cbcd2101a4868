"""Finds projection heads in state dicts and the head in `disco_jax.models` that equals each."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from disco_jax.convert.family import State
from disco_jax.convert.network import Head
from disco_jax.models.heads import VARIANTS

# Names of heads, relative to the network's prefix. Projectors precede names that may also be
# classifiers.
_ROOTS = (
    "projector",  # solo-learn, VICReg, Barlow Twins
    "projection_head.layers",  # Lightly
    "projection_head",  # SwAV
    "neck.mlp",  # OpenMMLab, for MoCo
    "neck",  # OpenMMLab
    "head.projection.mlp",
    "head.mlp",
    "head.linear",  # ReSSL, whose layer numbers follow without a dot
    "fc",
    "classifier",
    "head",
    "head.fc",
)
# Names of classifiers, which exist beside a projection head or instead of one.
_CLASSIFIER_ROOTS = ("fc", "classifier", "head", "head.fc")
# Widths of projection heads are multiples of this; numbers of classes are not.
_WIDTH_MULTIPLE = 32
# Kinds of layers: linear, BatchNorm, any other.
_LINEAR, _NORM, _OTHER = "LN?"


def find(network: State, backbone: str = "", own: Sequence[str] = ()) -> Head:
    """Finds the head of a network and the classifiers beside it.

    Args:
      network: key relative to the network's prefix -> array.
      backbone: the prefix of the backbone's keys; "": they are not separate from the others.
      own: prefixes of keys that belong to the backbone although they carry the name of a head.
    """
    network = {k: v for k, v in network.items() if not k.startswith(tuple(own))} if own else network
    roots = (*_ROOTS, *(backbone + root for root in _CLASSIFIER_ROOTS)) if backbone else _ROOTS
    projector, classifiers = Head(), []
    for root in roots:
        head = sequence(network, root)
        if not head.order:
            continue
        if _classifies(network, head, backbone):
            classifiers.append(root)
        elif not projector.order and _LINEAR in head.order:
            projector = head
    return dataclasses.replace(
        projector, prototypes=_prototypes(network), classifiers=tuple(classifiers)
    )


def sequence(network: State, root: str) -> Head:
    """Returns the layers under `root` in the order of their numbers.

    `order` of the returned head is "" if there are none.
    """
    if _kind_of_layer(network, root) == _LINEAR:
        return Head(root, ("",), order=_LINEAR)
    # OpenMMLab names layers fc0, bn0, fc1, ...; others 0, 1, 3, ...
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


def spec(network: State, whole_network: State, head: Head, family: str) -> dict[str, Any]:
    """Describes a head that `problem` has accepted.

    Args:
      network: key relative to the head's prefix -> array.
      whole_network: key relative to the network's prefix -> array, for the prototypes.
      head: the head in `network`.
      family: one of `recognise.FAMILIES`.

    Returns:
      The config fields head, hidden, layers, dim, prototypes and adapter.
    """
    keys = ((f"{name}.weight_v", f"{name}.weight") for name in head.prototypes)
    prototypes = tuple(
        len(whole_network[normed] if normed in whole_network else whole_network[plain])
        for normed, plain in keys
    )
    fields = {"head": "none", "hidden": 0, "layers": 0, "dim": 128}
    if head.linear:
        kind, widths = _kind(head, family), _widths(network, head)
        default_layers = VARIANTS.get(kind, {}).get("layers", 2)
        hidden = 0 if len(widths) == 1 else widths[0]
        layers = 0 if kind == "regression" or not hidden else len(widths)
        fields = {
            "head": kind,
            "hidden": hidden,
            "layers": 0 if layers == default_layers else layers,
            "dim": widths[-1],
        }
    return {**fields, "prototypes": prototypes, "adapter": 0}


def problem(network: State, head: Head, family: str) -> str:
    """Explains why no head in `disco_jax.models` equals this one.

    Returns:
      The rest of an error message; "" if a head equals it.
    """
    if not head.order or not head.linear:
        return ""
    if _OTHER in head.order:
        return "has a layer that is neither linear nor BatchNorm"
    if not _kind(head, family):
        names = {_LINEAR: "linear", _NORM: "BatchNorm"}
        layers = ", ".join(names[kind] for kind in head.order)
        return f"is a sequence of layers that no head here has: {layers}"
    hidden = _widths(network, head)[:-1]
    if len(set(hidden)) > 1 and _kind(head, family) != "regression":
        return f"has hidden layers of several widths: {', '.join(map(str, hidden))}"
    return ""


def defaults(state: State, prefix: str, head: Head) -> dict[str, float]:
    """Returns values for biases and scales that a head may lack but that its Flax module has.

    A linear layer may have no bias if BatchNorm follows, which subtracts the mean, or if no linear
    layer of the head has one. A BatchNorm layer at the end may have neither scale nor bias.

    Args:
      state: full key -> array.
      prefix: of the head.
      head: the head in `state`.

    Returns:
      Full key -> value.
    """
    values: dict[str, float] = {}
    names = iter(head.linear)
    biased = any(f"{prefix}{head.root}{name}.bias" in state for name in head.linear)
    for layer, after in itertools.pairwise(f"{head.order} "):
        if layer != _LINEAR:
            continue
        key = f"{prefix}{head.root}{next(names)}.bias"
        if key not in state and (after == _NORM or not biased):
            values[key] = 0.0
    if head.order.endswith(_NORM):
        weight, bias = (f"{prefix}{head.root}{head.norm[-1]}.{leaf}" for leaf in ("weight", "bias"))
        if weight not in state and bias not in state:
            values |= {weight: 1.0, bias: 0.0}
    return values


def is_class_count(width: int) -> bool:
    """Returns whether a single layer of this width is a classifier, not a projection head."""
    return width % _WIDTH_MULTIPLE > 0


def _position(name: str) -> tuple[int, bool]:
    """Returns a sort key that puts fc0, bn0, fc1 and 0, 1, 3 in the order of the computation."""
    return int(re.sub(r"\D", "", name)), "bn" in name


def _kind_of_layer(network: State, name: str) -> str:
    weight = network.get(f"{name}.weight" if name else "weight")
    if weight is not None and weight.ndim == 2 and weight.size:
        return _LINEAR
    is_vector = weight is None or weight.ndim == 1
    return _NORM if is_vector and np.ndim(network.get(f"{name}.running_mean", 0)) == 1 else _OTHER


def _classifies(network: State, head: Head, backbone: str) -> bool:
    """Returns whether layers are a classifier, not a projection head."""
    name = head.root.removeprefix(backbone)
    if backbone and head.root == "classifier":
        return True  # trained beside the backbone, on its features
    if name not in _CLASSIFIER_ROOTS or head.order != _LINEAR:
        return False
    return is_class_count(*_widths(network, head))


def _widths(network: State, head: Head) -> list[int]:
    """Returns the output width of each linear layer, in order."""
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
    layers = {
        match[1]: array for key, array in network.items() if (match := pattern.fullmatch(key))
    }
    yield from sorted(name for name, array in layers.items() if array.ndim == 2)


def _kind(head: Head, family: str) -> str:
    """Returns the name of the head in `disco_jax.models` with the same layers, or ""."""
    order, layers = head.order, len(head.linear)
    if order == "LNLLNL":
        return "regression"
    plain, with_norm = re.fullmatch("L+", order), re.fullmatch("(LN)+L", order)
    if head.root == "head.mlp" and layers > 2:  # DINO's, with GELU
        return "dino" if plain else "dino_bn" if with_norm else ""
    # SwAV's embeddings have unit length, in DisCo's checkpoints too; so do SimCLR's in SEED.
    is_swav = head.root in ("projection_head", "head.projection.mlp") and family != "lightly"
    unit_length = is_swav or bool(head.prototypes) or family == "simclr"
    if plain:
        return "mlp_unit" if unit_length else "mlp"
    if with_norm:
        return "swav" if unit_length else "mlp_bn"
    return "mlp_bn_all" if re.fullmatch("(LN)+", order) and not unit_length else ""
