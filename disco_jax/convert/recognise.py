"""What a state dict holds: where its network stands, of which family, architecture and head."""

import dataclasses
import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import disco_jax.convert.heads as heads
from disco_jax import errors, models
from disco_jax.convert.heads import Head
from disco_jax.convert.names import LAYOUTS, Layout
from disco_jax.convert.shapes import backbone_spec
from disco_jax.convert.text import listed, shown

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
# Where a training keeps copies of its network, which are not what it is about.
_COPIES = re.compile(r"momentum|ema(_|$)|(^|_)(target|k|key)(_|$)")
# Modules beside a network, or in it, that belong to its training: copies, predictors, classifiers
# that look at it, memories, losses (Barlow Twins' begins with a BatchNorm).
_OF_TRAINING = re.compile(
    r"bn|(\w+_)?(momentum|ema|target|teacher|student|online|predictor|prediction_head|encoder_[qk]"
    r"|criterion|loss\w*|queue\w*|memory\w*|metrics?|data_preprocessor|normalizer)(_\w+)?"
)
# Layouts that one family alone has.
_OWN_LAYOUTS = {
    "sequential_resnet": "sslight",
    "lightly_resnet": "lightly",
    "sslight_mobilenetv2": "sslight",
    "seed_mobilenetv3": "seed",
    "tensorflow_resnet": "simclr",
}

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
    "moco_v3",
    "simsiam",
    "vicreg",
    "barlow_twins",
    "lightly",
    "solo_learn",
    "openmmlab",
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
    "mocov3": "moco_v3",
    "barlow": "barlow_twins",
    "barlowtwins": "barlow_twins",
    "solo": "solo_learn",
    "sololearn": "solo_learn",
    "mmselfsup": "openmmlab",
    "mmpretrain": "openmmlab",
}


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
    state: State,
    source: str,
    family: str = "",
    arch: str = "",
    prefix: str | None = None,
    allow: Sequence[str] = (),
) -> Recognised:
    """Tells what a state dict holds from its keys and shapes.

    Args:
      state: full keys to arrays in PyTorch's layout.
      source: what to call it in messages.
      family: one of `FAMILIES`, or a usual spelling of one; "": from the keys.
      arch: a backbone of ours, or a usual alias of one; "": from the shapes.
      prefix: where the network stands, e.g. "module.teacher_encoder_q."; None: the network that
        the checkpoint is about.
      allow: patterns of keys that may be left over: a head that is none of ours among them.

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
    _check_attention(found["backbone"], family, source)
    network = under(state, place.head or place.prefix)
    if reason := heads.problem(network, head, family):
        head = _without(network, place, head, allow, source, reason)
    of_head = heads.spec(network, under(state, place.prefix), head, family)
    return Recognised(family, place, layout, head, {**found, **of_head})


def under(state: State, prefix: str) -> dict[str, np.ndarray]:
    """The entries under `prefix`, without it and without BatchNorm's step counters."""
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and not key.endswith("num_batches_tracked")
    }


def networks(state: State) -> dict[str, str]:
    """prefix -> layout of every network in a state dict, whatever it is for."""
    found: dict[str, str] = {}
    for layout in LAYOUTS:
        first = layout.signature[0]
        for key in state:
            if key == first or key.endswith("." + first):
                prefix = key.removesuffix(first)
                outer = prefix.removesuffix("encoder.")  # of SSLight's, which has all of Lightly's
                if found.keys() & {prefix, outer}:
                    continue
                if _fits(state, prefix, layout):
                    found[prefix] = layout.name
    return found


def of_training(name: str) -> bool:
    """Whether a module beside a network is known to serve its training alone."""
    return _OF_TRAINING.fullmatch(name) is not None


def _layout(state: State, prefix: str) -> Layout | None:
    return next((layout for layout in LAYOUTS if _fits(state, prefix, layout)), None)


def _fits(state: State, prefix: str, layout: Layout) -> bool:
    """Whether a layout's signature is there; of its arrays the first is a layer's weight."""
    first = state.get(prefix + layout.signature[0])
    if first is None or first.ndim != 4 or not first.size:
        return False
    return all(prefix + key in state for key in layout.signature)


def _place(state: State, source: str, prefix: str | None) -> tuple[Place, Layout]:
    inside = ("backbone.", "net.", "")
    for place in PLACES if prefix is None else [Place(prefix, inner) for inner in inside]:
        layout = _layout(state, place.prefix + place.backbone)
        if layout:
            return place, layout
    found = networks(state)
    own = [name for name in found if not any(map(_COPIES.search, name.split(".")))] or [*found]
    if prefix is None and len(own) == 1:
        (only,) = own
        layout = _layout(state, only)
        assert layout is not None  # it was found there
        outer = only.removesuffix("backbone.")
        return Place(outer, only.removeprefix(outer)), layout
    if found:
        raise errors.UserError(
            f"{source} holds networks under {listed(map(repr, sorted(found)), 20)}; choose one "
            "with --prefix (of disco-jax import)."
        )
    some = listed(sorted(state)) or "none"
    raise errors.UserError(
        f"{source} does not hold a network that is known: {len(state)} arrays, among them {some}. "
        f"Known layouts: {', '.join(layout.name for layout in LAYOUTS)}."
    )


def _check_attention(backbone: str, family: str, source: str) -> None:
    """Refuses a ViT that divides its width among other heads of attention than ours."""
    if family == "moco_v3" and backbone.startswith("vit_small"):
        raise errors.UserError(
            f"{source} holds MoCo-v3's ViT-S, which has 12 heads of attention and {backbone} has "
            "6: the same weights compute something else, and are not read."
        )


def _family(state: State, place: Place, layout: Layout, head: Head) -> str:
    """Which code base wrote the checkpoint; between those that look the same, the likeliest."""
    if place.family or layout.name in _OWN_LAYOUTS:
        return place.family or _OWN_LAYOUTS[layout.name]
    if by_head := _family_of_head(state, place, head):
        return by_head
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
    if place.prefix == "module." and "fc" not in head.classifiers:
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


def _family_of_head(state: State, place: Place, head: Head) -> str:
    """Which code base calls a head or a network so; "": several do."""
    if head.root == "projector" and place.prefix == "module.":
        return "barlow_twins" if "module.bn.running_mean" in state else "vicreg"
    if head.root == "projector" and not place.prefix:
        return "solo_learn"
    if head.root == "projection_head.layers":
        return "lightly"
    if head.root.startswith("neck"):
        return "openmmlab"
    if place.prefix.endswith("base_encoder."):
        return "moco_v3"
    beside = f"{place.prefix.removesuffix('encoder.')}predictor."
    if place.prefix.endswith("encoder.") and any(key.startswith(beside) for key in state):
        return "simsiam"
    return ""


def _head(state: State, place: Place, layout: Layout) -> Head:
    if place.head:
        return heads.sequence(under(state, place.head), "")
    own = {
        "seed_mobilenetv3": (f"{place.backbone}classifier.0.",),
        "torchvision_mobilenetv3": (f"{place.backbone}classifier.0.",),
    }
    return heads.find(under(state, place.prefix), place.backbone, own.get(layout.name, ()))


def _without(
    network: State, place: Place, head: Head, allow: Sequence[str], source: str, reason: str
) -> Head:
    """No head, where all that there is of it may be left over."""
    start = head.root if head.root in ("", "head.linear") else f"{head.root}."
    prefix = place.head or place.prefix
    if all(allowed(prefix + key, allow) for key in network if key.startswith(start)):
        return Head(classifiers=head.classifiers)
    pattern = shown(f"{prefix}{start}*")
    raise errors.UserError(
        f"{source} has a head, {pattern}, that {reason}: leave it out with --allow '{pattern}' "
        "(of disco-jax import)."
    )


def allowed(key: str, allow: Sequence[str]) -> bool:
    """Whether a key matches one of some patterns."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in allow)
