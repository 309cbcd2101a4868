"""Writes networks as state dicts named as in timm, torchvision, MoCo and Detectron2."""

import dataclasses
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from disco_jax import errors
from disco_jax.convert import names, pickles, table
from disco_jax.convert.heads import Head, is_class_count
from disco_jax.convert.recognise import Prefix
from disco_jax.errors import UserError
from disco_jax.files import whole
from disco_jax.models import BACKBONES
from disco_jax.models.encoder import Encoder, Variables
from disco_jax.models.heads import RegressionHead

NAMINGS = ("timm", "torchvision", "moco", "detectron2")

# Backbone -> the framework's model that computes the same and loads the written weights; "": only
# the names are the framework's, which has no such model.
_TIMM = {
    **{f"resnet{n}": f"resnet{n}" for n in (18, 34, 50, 101, 152)},
    **{f"resnet50w{n}": "" for n in (2, 4, 5)},
    **{f"resnet{n}": "" for n in (8, 14, 20)},
    "efficientnet_b0": "efficientnet_b0",
    "efficientnet_b1": "efficientnet_b1",
    # For images of the nominal size, static padding equals timm's padding by the input.
    "efficientnet_b0_seed": "tf_efficientnet_b0",
    "efficientnet_b1_seed": "tf_efficientnet_b1",
    "tf_efficientnet_b0": "tf_efficientnet_b0",
    "tf_efficientnet_b1": "tf_efficientnet_b1",
    "mobilenetv2": "mobilenetv2_100",
    "mobilenetv3_large": "mobilenetv3_large_100",
    "mobilenetv3_large_tv": "mobilenetv3_large_100",
    "vit_tiny_p16": "vit_tiny_patch16_224",
    "vit_tiny_p32": "",
    "vit_small_p16": "vit_small_patch16_224",
    "vit_small_p8": "vit_small_patch8_224",
    "vit_base_p16": "vit_base_patch16_224",
    "vit_base_p8": "vit_base_patch8_224",
    "xcit_tiny_12_p16": "xcit_tiny_12_p16_224",
    "xcit_small_12_p16": "xcit_small_12_p16_224",
    "xcit_small_12_p8": "xcit_small_12_p8_224",
    "xcit_medium_24_p16": "xcit_medium_24_p16_224",
    "xcit_medium_24_p8": "xcit_medium_24_p8_224",
}
_TORCHVISION = {
    **{name: model for name, model in _TIMM.items() if name.startswith("resnet")},
    "efficientnet_b0": "efficientnet_b0",
    "efficientnet_b1": "efficientnet_b1",
    "mobilenetv2": "mobilenet_v2",
    "mobilenetv3_large": "mobilenet_v3_large",
    "mobilenetv3_large_tv": "mobilenet_v3_large",
}
_DETECTRON2 = {name: "" for name in _TIMM if name.startswith("resnet")}
MODELS = {"timm": _TIMM, "torchvision": _TORCHVISION, "detectron2": _DETECTRON2}


@dataclasses.dataclass(frozen=True)
class StateDict:
    """A network under the names of another code base.

    Attributes:
      arrays: key -> array in PyTorch's layout.
      model: the framework's model that loads it; "" if no model there is equal.
      notes: facts that a reader of the file must know.
    """

    arrays: dict[str, np.ndarray]
    model: str
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
    models = MODELS.get(naming)
    if models is not None and backbone not in models:
        raise UserError(
            f"{backbone} cannot be exported as {naming}, which has no equal model. {naming} "
            f"supports: {', '.join(models)}. The format 'moco' supports every backbone."
        )
    if with_head and naming == "detectron2":
        raise UserError(
            "A Detectron2 backbone cannot hold a projection head: leave out --with-head."
        )
    layout, rename = _layout(backbone, naming)
    prefix = "module.encoder_q." if naming == "moco" else ""
    head = _head(encoder, backbone, naming) if with_head else Head()
    arrays, notes = _arrays(encoder, variables, layout, Prefix(prefix), head)
    shift = _epsilon(encoder.backbone) - _framework_epsilon(encoder.backbone, backbone, naming)
    if shift:
        for key in arrays:
            if key.endswith("running_var"):
                arrays[key] = (arrays[key] + shift).astype(np.float32)
        notes = (
            *notes,
            f"{shift:+g} was added to every running variance, because BatchNorm in {naming} "
            "adds another epsilon; the features are unchanged.",
        )
    model = (models or {}).get(backbone, "")
    if model and _is_modified(encoder.backbone, backbone):
        model = ""
    return StateDict(rename(arrays), model, notes)


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


def _layout(backbone: str, naming: str) -> tuple[Callable, Callable]:
    """Returns the function that lists a backbone's modules, and one that finishes the dict."""
    unchanged = dict
    if backbone.startswith("resnet"):
        modules = names.detectron2_resnet if naming == "detectron2" else names.torchvision_resnet
        return modules, unchanged
    if backbone.startswith("vit"):
        return names.dino_vit, unchanged
    if backbone.startswith("xcit"):
        return names.xcit, names.to_timm_xcit if naming == "timm" else unchanged
    if naming == "moco" and backbone.endswith("_seed"):
        if backbone.startswith("mobilenet"):
            return names.seed_mobilenetv3, unchanged
        return names.lukemelas_efficientnet, unchanged
    if backbone == "mobilenetv2" and naming != "timm":
        return names.torchvision_mobilenetv2, unchanged
    if naming == "torchvision" or (naming == "moco" and backbone.endswith("_tv")):
        return names.torchvision_inverted, unchanged
    return names.timm_inverted, unchanged


def _head(encoder: Encoder, backbone: str, naming: str) -> Head:
    """Returns the head's layers as a sequence under the name of the classifier."""
    if encoder.adapter is not None:
        raise UserError("A state dict cannot hold a head behind an adapter: leave out --with-head.")
    linear, norm = table.head_layers(encoder)
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
        _root(encoder, backbone, naming, len(linear)),
        ("",) if len(linear) == 1 and not norm else tuple(f".{number}" for number in numbers),
        tuple(f".{number}" for number in norms),
        _prototypes(encoder),
    )


def _root(encoder: Encoder, backbone: str, naming: str, layers: int) -> str:
    """Returns a prefix for the head's keys from which `recognise` recognises the head."""
    if layers > 2 and getattr(encoder.head, "activation", "relu") == "gelu":
        return "head.mlp"
    if encoder.normalised():
        return "projection_head"
    if layers == 1 and is_class_count(encoder.head.dim):  # other names would be a classifier's
        return "projector"
    if backbone.startswith(("vit", "xcit")):
        return "head"
    if backbone.startswith("resnet") or backbone.endswith("_seed"):
        return "fc"
    # The classifier of torchvision's MobileNetV3 contains a layer of the backbone.
    tv_names = naming == "torchvision" or backbone.endswith("_tv")
    return "fc" if tv_names and backbone.startswith("mobilenetv3") else "classifier"


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
    encoder: Encoder, variables: Variables, modules: Callable, prefix: Prefix, head: Head
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    layout = names.Layout("export", (), modules)
    arrays = {}
    for entry in table.entries(encoder, layout, prefix, head):
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


def _epsilon(net: Any) -> float:
    """Returns the value that a backbone's BatchNorm adds to the variance."""
    return net.style.epsilon if hasattr(net, "style") else 1e-5


def _framework_epsilon(net: Any, backbone: str, naming: str) -> float:
    """Returns the value that BatchNorm in the framework's model adds to the variance."""
    if naming == "moco":
        return _epsilon(net)
    if naming == "torchvision":
        return 1e-3 if backbone.startswith("mobilenetv3") else 1e-5
    return 1e-3 if _TIMM[backbone].startswith("tf_") else 1e-5


def _is_modified(net: Any, backbone: str) -> bool:
    """Returns whether the network deviates from its named variant in width, stem or grid."""
    cls, fields = BACKBONES[backbone]
    default = cls(**fields)
    return any(
        getattr(net, f, None) != getattr(default, f, None) for f in ("width", "stem", "grid")
    )
