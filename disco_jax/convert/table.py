"""Every array of one network in both worlds: what reading and writing a state dict share."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from disco_jax.convert.heads import Head
from disco_jax.convert.names import LEAVES, Layout, Leaf, Name
from disco_jax.convert.recognise import Place
from disco_jax.models.encoder import Encoder


class Entry(NamedTuple):
    """One array.

    Attributes:
      theirs: its full key in a state dict.
      ours: its path in the variables: (collection, module, ..., name).
      leaf: how to turn one into the other.
    """

    theirs: str
    ours: tuple[str, ...]
    leaf: Leaf


_PROTOTYPES = {
    "weight": Leaf("weight", ("params", "kernel"), lambda x: x.T, lambda x: x.T),
    "weight_v": Leaf("weight_v", ("params", "kernel"), lambda x: x.T, lambda x: x.T),
    "weight_g": Leaf(
        "weight_g", ("params", "scale"), lambda x: np.reshape(x, -1), lambda x: x[:, None]
    ),
}


def entries(encoder: Encoder, layout: Layout, place: Place, head: Head) -> Iterator[Entry]:
    """Every array that a state dict can hold for `encoder`; biases that it has not included."""
    for name in layout.names(encoder.backbone):
        yield from _module(place.prefix + place.backbone, name, "backbone")
    for name in _head_names(encoder, head):
        yield from _module(place.head or place.prefix, name, "head")
    for i, theirs in enumerate(head.prototypes):
        normed = getattr(encoder.prototypes, "weight_norm", False)
        kinds = ("weight_v", "weight_g") if normed else ("weight",)
        for kind in kinds:
            leaf = _PROTOTYPES[kind]
            ours = ("params", "prototypes", f"{leaf.ours[1]}{i}")
            yield Entry(f"{place.prefix}{theirs}.{kind}", ours, leaf)


def _module(prefix: str, name: Name, part: str) -> Iterator[Entry]:
    for leaf in LEAVES[name.kind]:
        theirs = f"{prefix}{name.theirs}" + (f".{leaf.theirs}" if leaf.theirs else "")
        collection, last = leaf.ours
        path = (*name.ours.split("/"), last) if last else tuple(name.ours.split("/"))
        yield Entry(theirs, (collection, part, *path), leaf)


def _head_names(encoder: Encoder, head: Head) -> Iterator[Name]:
    linear, norm = our_head(encoder) if head.linear else ([], [])
    for theirs, ours in zip(head.linear, linear, strict=True):
        yield Name(f"{head.root}{theirs}", ours, "linear")
    for theirs, ours in zip(head.norm, norm, strict=True):
        yield Name(f"{head.root}{theirs}", ours, "batch_norm")


def our_head(encoder: Encoder) -> tuple[list[str], list[str]]:
    """Our names of the head's linear and BatchNorm layers, in the order of the computation."""
    head: Any = encoder.head
    kind = type(head).__name__
    if kind == "Identity":
        return [], []
    if kind == "RegressionHead":
        return ["hidden1", "out1", "hidden2", "out2"], ["hidden1_bn", "hidden2_bn"]
    layers = head.layers if head.hidden else 1
    hidden = [f"hidden{i}" if i > 1 else "hidden" for i in range(1, layers)]
    norms = [f"{name}_bn" for name in hidden if head.batch_norm]
    return [*hidden, "out"], [*norms, *(["out_bn"] if head.out_norm else [])]
