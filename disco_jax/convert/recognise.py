"""Recognises the network in a state dict: its prefix, family, architecture and head."""

import re
from collections.abc import Sequence
from typing import Any

import disco_jax.convert.heads as heads
from disco_jax import errors
from disco_jax.convert.backbones import FAMILIES as BACKBONE_FAMILIES
from disco_jax.convert.backbones import LAYOUTS
from disco_jax.convert.family import Layout, State
from disco_jax.convert.keys import entries_under, is_allowed
from disco_jax.convert.layouts import layout_at, networks
from disco_jax.convert.network import Head, Prefix, Recognised
from disco_jax.convert.text import listed, shown
from disco_jax.models.backbones import BACKBONES

# In search order: the main network of a training checkpoint precedes its copies, and a prefix that
# contains another precedes it. Matched from the start of the key, so that
# "module.teacher_encoder_q." does not match "encoder_q.".
PREFIXES = (
    Prefix("module.encoder_q.", "backbone.", family="sslight"),  # its MoCo
    Prefix("module.encoder_q.", "net.", family="ressl"),
    Prefix("module.encoder_q."),  # MoCo, DisCo, BINGO, published SEED students
    Prefix("encoder_q.module.", head="predict_q.module.", family="simreg"),
    Prefix("encoder_q."),
    Prefix("module.student.", "backbone.", family="sslight"),  # its DINO
    Prefix("module.network.", "backbone.", family="sslight"),  # its SwAV
    Prefix("module.student.", family="seed"),
    Prefix("module.module.module.", family="simclr"),  # SEED's teacher
    Prefix("module.", "backbone."),  # DINO's networks with BatchNorm
    Prefix("", "backbone."),  # DINO's other networks
    Prefix("module."),  # SwAV, CompRess
    Prefix(""),
)
# Modules that hold copies of the network, such as momentum encoders.
_COPIES = re.compile(r"momentum|ema(_|$)|(^|_)(target|k|key)(_|$)")
# Families of checkpoints: the code bases that write them.
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
# Other names of architectures.
_ALIASES = {alias: name for family in BACKBONE_FAMILIES for alias, name in family.aliases.items()}
# Backbone -> the one of equal shapes that `recognise` returns unless `arch` says otherwise.
_VARIANT_OF = {
    name: base for family in BACKBONE_FAMILIES for name, base in family.variant_of.items()
}
# Other names of families.
_FAMILY_ALIASES = {
    "moco": "moco_v2",
    "mocov1": "moco_v1",
    "mocov2": "moco_v2",
    "deepcluster": "deepcluster_v2",
    "deepclusterv2": "deepcluster_v2",
    "sela": "deepcluster_v2",  # equal heads and names
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


def recognise(
    state: State,
    source: str,
    family: str = "",
    arch: str = "",
    prefix: str | None = None,
    allow: Sequence[str] = (),
) -> Recognised:
    """Recognises the network in a state dict from keys and shapes.

    Args:
      state: full keys to arrays in PyTorch's layout.
      source: its name in messages.
      family: one of `FAMILIES` or an alias; "": inferred from the keys.
      arch: the name of a backbone or an alias; "": inferred from the shapes.
      prefix: of the network's keys, e.g. "module.teacher_encoder_q."; None: the main network of the
        checkpoint.
      allow: patterns of keys that may be left over, including the keys of an unsupported head.

    Raises:
      UserError: no known network is there, or `family` or `arch` is unknown or does not match.
    """
    known_family = family.lower().replace("-", "_")
    known_family = _FAMILY_ALIASES.get(known_family, known_family)
    if known_family and known_family not in FAMILIES:
        raise errors.unknown("family", family, FAMILIES)
    where, layout = _find_network(state, source, prefix)
    layout, spec = _describe(entries_under(state, where.root + where.backbone), layout, source)
    spec.update(_check_arch(arch, spec["backbone"], source))
    head = _head(state, where, layout)
    family = known_family or _family(state, where, layout, head)
    spec["backbone"] = _of_code_base(family, spec["backbone"], source)
    network = entries_under(state, where.head or where.root)
    if reason := heads.problem(network, head, family):
        head = _leave_out(network, where, head, allow, source, reason)
    head_spec = heads.spec(network, entries_under(state, where.root), head, family)
    return Recognised(family, where, layout, head, {**spec, **head_spec})


def _find_network(state: State, source: str, prefix: str | None) -> tuple[Prefix, Layout]:
    inside = ("backbone.", "net.", "")
    for where in PREFIXES if prefix is None else [Prefix(prefix, inner) for inner in inside]:
        layout = layout_at(state, where.root + where.backbone)
        if layout:
            return where, layout
    layouts = networks(state)
    main = [name for name in layouts if not any(map(_COPIES.search, name.split(".")))]
    main = main or [*layouts]
    if prefix is None and len(main) == 1:
        (only,) = main
        layout = layout_at(state, only)
        assert layout is not None  # `networks` found it
        outer = only.removesuffix("backbone.")
        return Prefix(outer, only.removeprefix(outer)), layout
    if layouts:
        raise errors.UserError(
            f"{source} holds networks under {listed(map(repr, sorted(layouts)), 20)}; choose one "
            "with --prefix (an option of disco-jax import)."
        )
    examples = listed(sorted(state)) or "none"
    raise errors.UserError(
        f"{source} does not hold a known network: {len(state)} arrays, among them {examples}. "
        f"Known layouts: {', '.join(dict.fromkeys(layout.name for layout in LAYOUTS))}."
    )


def _describe(state: State, layout: Layout, source: str) -> tuple[Layout, dict[str, Any]]:
    """Returns the layout, of those with this name, whose shapes fit, and the config fields.

    Raises:
      UserError: no backbone in `models.BACKBONES` has these shapes.
    """
    for candidate in LAYOUTS:
        spec = candidate.spec(state) if candidate.name == layout.name else None
        if spec is not None:
            return candidate, {"width": 0, "stem": "", "grid": 0, **spec}
    raise errors.UserError(
        f"{source} holds a backbone in the layout {layout.name} that is none of "
        f"{', '.join(BACKBONES)}."
    )


def _of_code_base(family: str, backbone: str, source: str) -> str:
    """Returns the backbone that computes what a family's code does; refuses what none computes."""
    for declared in BACKBONE_FAMILIES:
        backbone = declared.by_code_base.get((family, backbone), backbone)
        if reason := declared.refused.get((family, backbone)):
            raise errors.UserError(f"{source} {reason}")
    return backbone


def _family(state: State, prefix: Prefix, layout: Layout, head: Head) -> str:
    """Returns the family that wrote the checkpoint; the likeliest if several fit."""
    if prefix.family or layout.only:
        return prefix.family or layout.only
    if family := _family_of_head(state, prefix, head):
        return family
    if any(key.startswith("module.teacher_encoder_q.") for key in state):
        return "disco"
    if prefix.root.endswith("encoder_q."):
        if layout.encoder_q:
            equal, different = layout.encoder_q
            other = networks(state).get("module.encoder_k.", layout.name)
            return equal if other == layout.name else different
        return "moco_v2" if len(head.linear) > 1 else "moco_v1"
    if any("prototypes.prototypes" in key for key in state):
        return "deepcluster_v2"
    if head.root == "projection_head":
        return "swav"
    if any(key.endswith("last_layer.weight_v") for key in state):
        return "dino"
    if layout.authors:
        return layout.authors
    if prefix.root == "module." and "fc" not in head.classifiers:
        return "compress"
    return layout.default(state)


def _check_arch(arch: str, recognised: str, source: str) -> dict[str, str]:
    """Returns {"backbone": ...} for a given name after comparing it with the recognised one."""
    if not arch:
        return {}
    name = arch.lower().replace("-", "_").removesuffix("_224").replace("_patch", "_p")
    name = _ALIASES.get(name, name)
    if name not in BACKBONES:
        raise errors.unknown("arch", arch, BACKBONES)
    # Variants of one architecture differ in names, padding and epsilon, not in shapes.
    base = _VARIANT_OF.get(recognised, recognised)
    if _VARIANT_OF.get(name, name) != base:
        raise errors.UserError(f"{source} holds a {recognised}, not a {arch}.")
    return {"backbone": name if name != base else recognised}


def _family_of_head(state: State, prefix: Prefix, head: Head) -> str:
    """Returns the family that uses these names of head and network; "" if several do."""
    if head.root == "projector" and prefix.root == "module.":
        return "barlow_twins" if "module.bn.running_mean" in state else "vicreg"
    if head.root == "projector" and not prefix.root:
        return "solo_learn"
    if head.root == "projection_head.layers":
        return "lightly"
    if head.root.startswith("neck"):
        return "openmmlab"
    if prefix.root.endswith("base_encoder."):
        return "moco_v3"
    beside = f"{prefix.root.removesuffix('encoder.')}predictor."
    if prefix.root.endswith("encoder.") and any(key.startswith(beside) for key in state):
        return "simsiam"
    return ""


def _head(state: State, prefix: Prefix, layout: Layout) -> Head:
    if prefix.head:
        return heads.sequence(entries_under(state, prefix.head), "")
    own = tuple(prefix.backbone + key for key in layout.own)
    return heads.find(entries_under(state, prefix.root), prefix.backbone, own)


def _leave_out(
    network: State, prefix: Prefix, head: Head, allow: Sequence[str], source: str, reason: str
) -> Head:
    """Returns a head without layers if all its keys may be left over; refuses it otherwise."""
    start = head.root if head.root in ("", "head.linear") else f"{head.root}."
    outer = prefix.head or prefix.root
    if all(is_allowed(outer + key, allow) for key in network if key.startswith(start)):
        return Head(classifiers=head.classifiers)
    pattern = shown(f"{outer}{start}*")
    raise errors.UserError(
        f"{source} has a head, {pattern}, that {reason}: leave it out with --allow '{pattern}' "
        "(an option of disco-jax import)."
    )
