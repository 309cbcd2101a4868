"""Writes networks as state dicts named as in timm, torchvision, MoCo and Detectron2."""

import dataclasses
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from disco_jax import errors
from disco_jax.convert import name_table, pickles
from disco_jax.convert.backbones import FAMILIES
from disco_jax.convert.family import Export
from disco_jax.convert.heads import is_class_count
from disco_jax.convert.network import Head, Prefix
from disco_jax.errors import UserError
from disco_jax.files import whole
from disco_jax.models import find
from disco_jax.models.encoder import Encoder, Variables
from disco_jax.models.heads import RegressionHead

NAMINGS = ("timm", "torchvision", "moco", "detectron2")


@dataclasses.dataclass(frozen=True)
class StateDict:
    """A network under the names of another code base.

    Attributes:
      arrays: key -> array in PyTorch's layout.
      model: the framework's model that loads it; "" if no model there is equal.
      backbone: the one here that computes with these weights what `model` computes.
      notes: facts that a reader of the file must know.
    """

    arrays: dict[str, np.ndarray]
    model: str
    backbone: str
    notes: tuple[str, ...] = ()


def state_dict(
    backbone: str, encoder: Encoder, variables: Variables, naming: str, with_head: bool = False
) -> StateDict:
    """Returns the weights of a network under the names of another code base.

    Args:
      backbone: its name in `models.BACKBONES`.
      encoder: the network.
      variables: its weights.
      naming: one of `NAMINGS`. "moco" is the layout of the official code for this backbone, under
        "module.encoder_q.".
      with_head: keep the projection head, under the framework's name of the classifier.

    Raises:
      UserError: `naming` is unknown or cannot represent the network or its head.
    """
    if naming not in NAMINGS:
        raise errors.unknown("naming", naming, NAMINGS)
    exports = _exports(naming)
    if backbone not in exports:
        raise UserError(
            f"{backbone} cannot be exported as {naming}, which has no equal model. {naming} "
            f"supports: {', '.join(exports)}. The format 'moco' supports every backbone."
        )
    if with_head and naming == "detectron2":
        raise UserError(
            "A Detectron2 backbone cannot hold a projection head: leave out --with-head."
        )
    export = exports[backbone]
    prefix = "module.encoder_q." if naming == "moco" else ""
    head = _head(encoder, export) if with_head else Head()
    arrays, notes = _arrays(encoder, variables, export, Prefix(prefix), head)
    if export.epsilon is not None:
        shift = encoder.backbone.style.epsilon - export.epsilon
        notes += _shift_variances(arrays, shift, naming)
    arrays = export.finish(arrays)
    if not export.model or _is_modified(encoder.backbone, backbone):
        return StateDict(arrays, "", backbone, notes)
    return StateDict(arrays, export.model, export.read_as or backbone, notes)


def write(path: str, saved: StateDict, naming: str) -> None:
    """Writes a state dict; leaves no partial file if that fails.

    Args:
      path: `.pth`, `.safetensors` or, for "detectron2", `.pkl`.
      saved: from `state_dict`.
      naming: the one passed to `state_dict`.
    """
    with whole(path) as file:
        if naming == "detectron2":
            content = {
                "model": saved.arrays,
                "__author__": "disco_jax",
                "matching_heuristics": True,
            }
            file.write_bytes(pickle.dumps(content, protocol=4))
        elif epath.Path(path).suffix == ".safetensors":
            from safetensors.numpy import save

            file.write_bytes(save(saved.arrays))
        elif naming == "moco":
            extra = {"epoch": 0, "arch": saved.model or "disco_jax"}
            pickles.write(file, saved.arrays, extra)
        else:
            pickles.write(file, saved.arrays)


def _exports(naming: str) -> dict[str, Export]:
    """Returns backbone -> `Export` for every backbone that a naming supports."""
    exports = (family.exports.get(naming, {}) for family in FAMILIES)
    return {name: export for table in exports for name, export in table.items()}


def _head(encoder: Encoder, export: Export) -> Head:
    """Returns the head's layers as a sequence under the name of the classifier."""
    if encoder.adapter is not None:
        raise UserError("A state dict cannot hold a head behind an adapter: leave out --with-head.")
    linear, norm = name_table.head_layers(encoder)
    if not linear:
        return Head(prototypes=_prototypes(encoder))
    if isinstance(encoder.head, RegressionHead):
        numbers: tuple[int, ...] = (0, 3, 4, 7)
        norms: tuple[int, ...] = (1, 5)
    else:
        step = 3 if norm else 2
        numbers = tuple(step * i for i in range(len(linear)))
        norms = tuple(number + 1 for number in numbers[: len(norm)])
    return Head(
        _root(encoder, export, len(linear)),
        ("",) if len(linear) == 1 and not norm else tuple(f".{number}" for number in numbers),
        tuple(f".{number}" for number in norms),
        _prototypes(encoder),
    )


def _root(encoder: Encoder, export: Export, layers: int) -> str:
    """Returns a prefix for the head's keys from which `recognise` recognises the head."""
    if layers > 2 and getattr(encoder.head, "activation", "relu") == "gelu":
        return "head.mlp"
    if encoder.normalised():
        return "projection_head"
    if layers == 1 and is_class_count(encoder.head.dim):  # other names would be a classifier's
        return "projector"
    return export.classifier


def _prototypes(encoder: Encoder) -> tuple[str, ...]:
    if encoder.prototypes is None:
        return ()
    if encoder.prototypes.weight_norm:
        return ("head.last_layer",)
    counts = encoder.prototypes.counts
    if len(counts) == 1:
        return ("prototypes",)
    return tuple(f"prototypes.prototypes{i}" for i in range(len(counts)))


def _arrays(
    encoder: Encoder, variables: Variables, export: Export, prefix: Prefix, head: Head
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    arrays = {}
    for entry in name_table.entries(encoder, export.modules, prefix, head):
        value: Any = variables
        for part in entry.flax:
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            continue  # this layer has no bias
        array = entry.param.save(np.asarray(value, np.float32))
        arrays[entry.torch] = np.ascontiguousarray(array)
        if entry.torch.endswith("running_var"):
            counter = entry.torch.replace("running_var", "num_batches_tracked")
            arrays[counter] = np.zeros((), np.int64)
    notes = () if head.linear else ("The projection head was left out.",)
    return arrays, notes


def _shift_variances(arrays: dict[str, np.ndarray], shift: float, naming: str) -> tuple[str, ...]:
    """Adds `shift` to every running variance in place; returns the notes about it."""
    if not shift:
        return ()
    for key in arrays:
        if key.endswith("running_var"):
            arrays[key] = (arrays[key] + shift).astype(np.float32)
    return (
        f"{shift:+g} was added to every running variance, because BatchNorm in {naming} adds "
        "another epsilon; the features are unchanged.",
    )


def _is_modified(net: Any, backbone: str) -> bool:
    """Returns whether the network deviates from its named variant in width, stem or grid."""
    cls, fields = find(backbone)
    default = cls(**fields)
    return any(
        getattr(net, f, None) != getattr(default, f, None) for f in ("width", "stem", "grid")
    )
