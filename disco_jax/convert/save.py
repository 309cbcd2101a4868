"""Networks out: state dicts as timm, torchvision, MoCo and Detectron2 name them."""

import dataclasses
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from disco_jax import errors
from disco_jax.convert import names, pickles, table
from disco_jax.convert.heads import Head, is_class_count
from disco_jax.convert.recognise import Place
from disco_jax.errors import UserError
from disco_jax.files import whole
from disco_jax.models import BACKBONES
from disco_jax.models.encoder import Encoder, Variables
from disco_jax.models.heads import RegressionHead

NAMINGS = ("timm", "torchvision", "moco", "detectron2")

# Backbone of ours -> the model of theirs that computes the same and takes the weights as they are
# named; "": names only, there is no such model to load them into.
_TIMM = {
    **{f"resnet{n}": f"resnet{n}" for n in (18, 34, 50, 101, 152)},
    **{f"resnet50w{n}": "" for n in (2, 4, 5)},
    **{f"resnet{n}": "" for n in (8, 14, 20)},
    "efficientnet_b0": "efficientnet_b0",
    "efficientnet_b1": "efficientnet_b1",
    # TensorFlow's padding for the nominal size is what it is for images of that size.
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
    **{name: theirs for name, theirs in _TIMM.items() if name.startswith("resnet")},
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
    """A network in the names of another code base.

    Attributes:
      arrays: key -> array in PyTorch's layout.
      model: the model of theirs to load it into; "" if there is none that is the same.
      notes: what a reader of the file must know.
    """

    arrays: dict[str, np.ndarray]
    model: str
    notes: tuple[str, ...] = ()


def state_dict(
    backbone: str, encoder: Encoder, variables: Variables, naming: str, with_head: bool = False
) -> StateDict:
    """The weights of a network in the names of another code base.

    Args:
      backbone: its name in `models.BACKBONES`.
      encoder: the network.
      variables: its weights.
      naming: one of `NAMINGS`. "moco" is the layout of the official code for this backbone, under
        "module.encoder_q.".
      with_head: keep the projection head, under the name of the classifier there.

    Raises:
      UserError: a name that is not known, or a network that the naming has no place for.
    """
    if naming not in NAMINGS:
        raise errors.unknown("naming", naming, NAMINGS)
    table_of = MODELS.get(naming)
    if table_of is not None and backbone not in table_of:
        raise UserError(
            f"{backbone} cannot be exported as {naming}: nothing there computes the same. "
            f"{naming} takes: {', '.join(table_of)}. The format 'moco' takes any."
        )
    if with_head and naming == "detectron2":
        raise UserError("A Detectron2 backbone has no place for a projection head.")
    layout, rename = _layout(backbone, naming)
    prefix = "module.encoder_q." if naming == "moco" else ""
    head = _head(encoder, backbone, naming) if with_head else Head()
    arrays, notes = _arrays(encoder, variables, layout, Place(prefix), head)
    shift = _epsilon(encoder.backbone) - _their_epsilon(encoder.backbone, backbone, naming)
    if shift:
        for key in arrays:
            if key.endswith("running_var"):
                arrays[key] = (arrays[key] + shift).astype(np.float32)
        notes = (
            *notes,
            f"{shift:+g} was added to every running variance, because BatchNorm there adds "
            "another epsilon; the features are the same.",
        )
    model = (table_of or {}).get(backbone, "")
    if model and _altered(encoder.backbone, backbone):
        model = ""
    return StateDict(rename(arrays), model, notes)


def write(path: str, saved: StateDict, naming: str) -> None:
    """Writes a state dict; nothing is left behind when that fails.

    Args:
      path: `.pth`, `.safetensors` or, for "detectron2", `.pkl`.
      saved: from `state_dict`.
      naming: that it was made with.
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
    """The names of a backbone's modules there, and the last change to the finished dict."""
    same = dict
    if backbone.startswith("resnet"):
        own = names.detectron2_resnet if naming == "detectron2" else names.torchvision_resnet
        return own, same
    if backbone.startswith("vit"):
        return names.dino_vit, same
    if backbone.startswith("xcit"):
        return names.xcit, names.to_timm_xcit if naming == "timm" else same
    if naming == "moco" and backbone.endswith("_seed"):
        if backbone.startswith("mobilenet"):
            return names.seed_mobilenetv3, same
        return names.lukemelas_efficientnet, same
    if backbone == "mobilenetv2" and naming != "timm":
        return names.torchvision_mobilenetv2, same
    if naming == "torchvision" or (naming == "moco" and backbone.endswith("_tv")):
        return names.torchvision_inverted, same
    return names.timm_inverted, same


def _head(encoder: Encoder, backbone: str, naming: str) -> Head:
    """Where the head goes: a sequence under the name of the classifier."""
    if encoder.adapter is not None:
        raise UserError("A head behind an adapter has no place in a state dict; leave it out.")
    linear, norm = table.our_head(encoder)
    if not linear:
        return Head(prototypes=_prototypes(encoder))
    if isinstance(encoder.head, RegressionHead):
        places: tuple[int, ...] = (0, 3, 4, 7)
        norms: tuple[int, ...] = (1, 5)
    else:
        step = 3 if norm else 2
        places = tuple(step * i for i in range(len(linear)))
        norms = tuple(place + 1 for place in places[: len(norm)])
    return Head(
        _root(encoder, backbone, naming, len(linear)),
        ("",) if len(linear) == 1 and not norm else tuple(f".{place}" for place in places),
        tuple(f".{place}" for place in norms),
        _prototypes(encoder),
    )


def _root(encoder: Encoder, backbone: str, naming: str, layers: int) -> str:
    """What the keys of the head start with, chosen so that reading the file recognises it."""
    if layers > 2 and getattr(encoder.head, "activation", "relu") == "gelu":
        return "head.mlp"
    if encoder.normalised():
        return "projection_head"
    if layers == 1 and is_class_count(encoder.head.dim):  # would be read as a classifier
        return "projector"
    if backbone.startswith(("vit", "xcit")):
        return "head"
    if backbone.startswith("resnet") or backbone.endswith("_seed"):
        return "fc"
    # The classifier of torchvision's MobileNetV3 holds a layer of the backbone.
    tail = naming == "torchvision" or backbone.endswith("_tv")
    return "fc" if tail and backbone.startswith("mobilenetv3") else "classifier"


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
    encoder: Encoder, variables: Variables, names_of: Callable, place: Place, head: Head
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    layout = names.Layout("export", (), names_of)
    arrays = {}
    for entry in table.entries(encoder, layout, place, head):
        value: Any = variables
        for part in entry.ours:
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            continue  # a bias that this layer does not have
        saved = entry.leaf.save(np.asarray(value, np.float32))
        arrays[entry.theirs] = np.ascontiguousarray(saved)
        if entry.theirs.endswith("running_var"):
            counter = entry.theirs.replace("running_var", "num_batches_tracked")
            arrays[counter] = np.zeros((), np.int64)
    notes = () if head.linear else ("The projection head was left out.",)
    return arrays, notes


def _epsilon(net: Any) -> float:
    """What BatchNorm adds to the variance in a backbone of ours."""
    return net.style.epsilon if hasattr(net, "style") else 1e-5


def _their_epsilon(net: Any, backbone: str, naming: str) -> float:
    """The same in theirs."""
    if naming == "moco":
        return _epsilon(net)
    if naming == "torchvision":
        return 1e-3 if backbone.startswith("mobilenetv3") else 1e-5
    return 1e-3 if _TIMM[backbone].startswith("tf_") else 1e-5


def _altered(net: Any, backbone: str) -> bool:
    """Whether the network deviates from the variant that its name stands for."""
    cls, fields = BACKBONES[backbone]
    plain = cls(**fields)
    return any(getattr(net, f, None) != getattr(plain, f, None) for f in ("width", "stem", "grid"))
