"""What a state dict holds: where its network stands, of which family, architecture and head."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from disco_jax import errors, models
from disco_jax.convert.names import LAYOUTS, Layout
from disco_jax.convert.shapes import backbone_spec

State = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one network stands in a state dict.

    Attributes:
      prefix: of all its keys.
      backbone: of the backbone's, behind `prefix`.
      head: of the head's keys where they stand elsewhere (SimReg's predictor).
      family: that alone puts its network there; "": several do.
    """

    prefix: str
    backbone: str = ""
    head: str = ""
    family: str = ""


# In order: what a training checkpoint means by its network comes before its other copies, and
# the prefixes that contain others before those. Matched from the start of the key, so that
# "module.teacher_encoder_q." is not taken for "encoder_q.".
PLACES = (
    Place("module.encoder_q.", "backbone.", family="sslight"),  # its MoCo
    Place("module.encoder_q.", "net.", family="ressl"),
    Place("module.encoder_q."),  # MoCo, DisCo, BINGO, published SEED students
    Place("encoder_q.module.", head="predict_q.module.", family="simreg"),
    Place("encoder_q."),
    Place("module.student.", "backbone.", family="sslight"),  # its DINO
    Place("module.network.", "backbone.", family="sslight"),  # its SwAV
    Place("module.student.", family="seed"),
    Place("module.module.module.", family="simclr"),  # SEED's teacher
    Place("module.", "backbone."),  # DINO's networks with BatchNorm
    Place("", "backbone."),  # DINO's other networks
    Place("module."),  # SwAV, CompRess
    Place(""),
)
# Layouts that one family alone has.
_OWN_LAYOUTS = {
    "sequential_resnet": "sslight",
    "sslight_mobilenetv2": "sslight",
    "seed_mobilenetv3": "seed",
    "tensorflow_resnet": "simclr",
}

# Sequences of linear and BatchNorm layers that end a network, by the name they stand under.
_HEADS = (
    "fc",
    "classifier",
    "projection_head",
    "head.projection.mlp",
    "head.mlp",
    "head.linear",
    "head",
)
FAMILIES = (
    "moco_v1",
    "moco_v2",
    "disco",
    "seed",
    "bingo",
    "swav",
    "deepcluster_v2",
    "dino",
    "simclr",
    "byol",
    "ressl",
    "compress",
    "simreg",
    "sslight",
    "torchvision",
    "timm",
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Input normalisation of the families that deviate.
_NORMALISATION = {
    "swav": (IMAGENET_MEAN, (0.228, 0.224, 0.225)),
    "deepcluster_v2": (IMAGENET_MEAN, (0.228, 0.224, 0.225)),
    "simclr": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
# Other names that architectures go by.
_ALIASES = {
    "mobilenet_v2": "mobilenetv2",
    "mobilenetv2_100": "mobilenetv2",
    "mobilenet_v3_large": "mobilenetv3_large",
    "mobilenetv3_large_100": "mobilenetv3_large",
    "rn50w2": "resnet50w2",
    "rn50w4": "resnet50w4",
    "rn50w5": "resnet50w5",
    "resnet50x2": "resnet50w2",
    "resnet50x4": "resnet50w4",
    "vit_tiny": "vit_tiny_p16",
    "vit_small": "vit_small_p16",
    "vit_base": "vit_base_p16",
    "vits16": "vit_small_p16",
    "vits8": "vit_small_p8",
    "vitb16": "vit_base_p16",
    "vitb8": "vit_base_p8",
    "deit_tiny": "vit_tiny_p16",
    "deit_tiny_p16": "vit_tiny_p16",
    "deit_small": "vit_small_p16",
    "deit_small_p16": "vit_small_p16",
    "xcit_tiny": "xcit_tiny_12_p16",
    "xcit_small": "xcit_small_12_p16",
}
_FAMILY_ALIASES = {
    "moco": "moco_v2",
    "mocov1": "moco_v1",
    "mocov2": "moco_v2",
    "deepcluster": "deepcluster_v2",
    "deepclusterv2": "deepcluster_v2",
    "sela": "deepcluster_v2",  # the same heads and names
    "selav2": "deepcluster_v2",
    "sela_v2": "deepcluster_v2",
    "xcit": "dino",
}


@dataclasses.dataclass(frozen=True)
class Head:
    """A projection head in a state dict.

    Attributes:
      root: what its keys start with, behind the network's prefix.
      linear: the names of its linear layers behind the root, in order; ("",) for a single one.
      norm: of its BatchNorm layers.
      prototypes: the names of the layers of prototypes behind the network's prefix.
    """

    root: str = ""
    linear: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()
    prototypes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Recognised:
    """A network in a state dict, ready to be read.

    Attributes:
      family: one of `FAMILIES`.
      place: where it stands.
      layout: how its backbone's weights are named.
      head: where its head's weights stand.
      spec: the fields of a network's part of a config.
    """

    family: str
    place: Place
    layout: Layout
    head: Head
    spec: dict[str, Any]

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation that images in [0, 1] are normalised with, by channel."""
        return _NORMALISATION.get(self.family, (IMAGENET_MEAN, IMAGENET_STD))


def recognise(
    state: State, source: str, family: str = "", arch: str = "", prefix: str | None = None
) -> Recognised:
    """Tells what a state dict holds from its keys and shapes.

    Args:
      state: full keys to arrays in PyTorch's layout.
      source: what to call it in messages.
      family: one of `FAMILIES`, or a usual spelling of one; "": from the keys.
      arch: a backbone of ours, or a usual alias of one; "": from the shapes.
      prefix: where the network stands, e.g. "module.teacher_encoder_q."; None: the network that
        the checkpoint is about.

    Raises:
      UserError: when nothing known is there, or a name given is not known.
    """
    plain = family.lower().replace("-", "_")
    plain = _FAMILY_ALIASES.get(plain, plain)
    if plain and plain not in FAMILIES:
        raise errors.unknown("family", family, FAMILIES)
    place, layout = _place(state, source, prefix)
    backbone = under(state, place.prefix + place.backbone)
    found = backbone_spec(backbone, layout, source)
    found.update(_named(arch, found["backbone"], source))
    head = _head(state, place, layout)
    family = plain or _family(state, place, layout, head)
    if family == "byol" and found["backbone"] == "resnet50":
        found["backbone"] = "resnet50_same"
    return Recognised(
        family, place, layout, head, {**found, **_head_spec(state, place, head, family)}
    )


def under(state: State, prefix: str) -> dict[str, np.ndarray]:
    """The entries under `prefix`, without it and without BatchNorm's step counters."""
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and not key.endswith("num_batches_tracked")
    }


def networks(state: State) -> dict[str, str]:
    """prefix -> layout of every network in a state dict, whatever it is for."""
    found = {}
    for layout in LAYOUTS:
        first = layout.signature[0]
        for key in state:
            if key == first or key.endswith("." + first):
                prefix = key.removesuffix(first)
                if prefix not in found and all(prefix + k in state for k in layout.signature):
                    found[prefix] = layout.name
    return found


def _layout(state: State, prefix: str) -> Layout | None:
    for layout in LAYOUTS:
        if all(prefix + key in state for key in layout.signature):
            return layout
    return None


def _place(state: State, source: str, prefix: str | None) -> tuple[Place, Layout]:
    inside = ("backbone.", "net.", "")
    for place in PLACES if prefix is None else [Place(prefix, inner) for inner in inside]:
        layout = _layout(state, place.prefix + place.backbone)
        if layout:
            return place, layout
    found = networks(state)
    if prefix is None and len(found) == 1:
        (only,) = found
        layout = _layout(state, only)
        assert layout is not None  # it was found there
        return Place(only), layout
    if found:
        raise errors.UserError(
            f"{source} holds networks under {', '.join(map(repr, sorted(found)))}; say which one "
            "with prefix=."
        )
    some = ", ".join(sorted(state)[:5]) or "none"
    raise errors.UserError(
        f"{source} does not hold a network that is known: {len(state)} arrays, among them {some}. "
        f"Known layouts: {', '.join(layout.name for layout in LAYOUTS)}."
    )


def _family(state: State, place: Place, layout: Layout, head: Head) -> str:
    """Which code base wrote the checkpoint; between those that look the same, the likeliest."""
    if place.family or layout.name in _OWN_LAYOUTS:
        return place.family or _OWN_LAYOUTS[layout.name]
    if any(key.startswith("module.teacher_encoder_q.") for key in state):
        return "disco"
    if place.prefix.endswith("encoder_q."):
        if layout.name == "lukemelas_efficientnet":
            # BINGO's second encoder is its teacher, of another architecture.
            other = networks(state).get("module.encoder_k.", layout.name)
            return "bingo" if other != layout.name else "seed"
        return "moco_v2" if len(head.linear) > 1 else "moco_v1"
    if any("prototypes.prototypes" in key for key in state):
        return "deepcluster_v2"
    if head.root == "projection_head":
        return "swav"
    if any(key.endswith("last_layer.weight_v") for key in state) or layout.name == "xcit":
        return "dino"
    if place.prefix == "module." and len(state.get("module.fc.weight", ())) != 1000:
        return "compress"
    if layout.name == "vit":
        return "timm" if "head.weight" in state else "dino"
    return "timm" if layout.name == "timm_inverted" else "torchvision"


def _named(arch: str, found: str, source: str) -> dict[str, str]:
    """{"backbone": ...} for a name that was given, checked against what the shapes say."""
    if not arch:
        return {}
    name = arch.lower().replace("-", "_").removesuffix("_224").replace("_patch", "_p")
    name = _ALIASES.get(name, name)
    if name not in models.BACKBONES:
        raise errors.unknown("arch", arch, models.BACKBONES)
    # The layouts of one architecture differ in names, padding and epsilon, not in shapes.
    if _bare(name) != _bare(found):
        raise errors.UserError(f"{source} holds a {found}, not a {arch}.")
    return {"backbone": name if name != _bare(found) else found}


def _bare(name: str) -> str:
    return re.sub(r"^tf_|_(seed|tv|same)$", "", name)


def _head(state: State, place: Place, layout: Layout) -> Head:
    if place.head:
        return _sequence(under(state, place.head), "")
    network = under(state, place.prefix)
    own = f"{place.backbone}classifier.0." if layout.name == "seed_mobilenetv3" else ""
    if layout.name == "torchvision_mobilenetv3":
        own = "classifier.0."  # the backbone's last layer
    network = {k: v for k, v in network.items() if not own or not k.startswith(own)}
    for root in _HEADS:
        head = _sequence(network, root)
        if head.linear:
            return dataclasses.replace(head, prototypes=_prototypes(network))
    return Head(prototypes=_prototypes(network))


def _sequence(network: State, root: str) -> Head:
    """The linear and BatchNorm layers under `root`, in the order of their numbers."""
    if root == "head.linear":  # ReSSL numbers them from 1, without a dot
        names = [f"{n}" for n in (1, 2) if f"head.linear{n}.weight" in network]
        return Head(root, tuple(names))
    start = f"{root}." if root else ""
    if getattr(network.get(f"{start}weight"), "ndim", 0) == 2:
        return Head(root, ("",))
    pattern = re.compile(re.escape(start) + r"(\d+)\.weight")
    found = {int(m[1]): v for k, v in network.items() if (m := pattern.fullmatch(k))}
    ordered = sorted(found)
    linear = tuple(f".{n}" if root else f"{n}" for n in ordered if found[n].ndim == 2)
    norm = tuple(f".{n}" if root else f"{n}" for n in ordered if found[n].ndim == 1)
    return Head(root, linear, norm)


def _prototypes(network: State) -> tuple[str, ...]:
    if "head.last_layer.weight_v" in network:
        return ("head.last_layer",)
    for single in ("prototypes", "head.prototypes"):
        if f"{single}.weight" in network:
            return (single,)
    pattern = re.compile(r"(prototypes\.prototypes\d+)\.weight")
    return tuple(sorted(m[1] for key in network if (m := pattern.fullmatch(key))))


def _head_spec(state: State, place: Place, head: Head, family: str) -> dict[str, Any]:
    """head, hidden, dim and prototypes of a head."""
    network = under(state, place.head or place.prefix)
    tail = under(state, place.prefix)
    keys = ((f"{name}.weight_v", f"{name}.weight") for name in head.prototypes)
    counts = tuple(len(tail[normed] if normed in tail else tail[plain]) for normed, plain in keys)
    if not head.linear:
        return {"head": "none", "hidden": 0, "dim": 128, "prototypes": counts, "adapter": 0}
    first, last = (network[f"{head.root}{head.linear[i]}.weight"] for i in (0, -1))
    kind = _head_kind(head, family)
    hidden = 0 if len(head.linear) == 1 else len(first)
    return {
        "head": kind,
        "hidden": hidden,
        "dim": len(last),
        "prototypes": counts,
        "adapter": 0,
    }


def _head_kind(head: Head, family: str) -> str:
    layers, norms = len(head.linear), len(head.norm)
    if layers == 4 and norms == 2:
        return "regression"
    if layers == 3 and head.root == "head.mlp":
        return "dino_bn" if norms else "dino"
    # SwAV's networks end on the unit sphere, inside DisCo's checkpoints too; SimCLR's in SEED do.
    swav = head.root in ("projection_head", "head.projection.mlp")
    unit = swav or bool(head.prototypes) or family == "simclr"
    if norms:
        return "swav" if unit else "mlp_bn"
    return "mlp_unit" if unit else "mlp"
