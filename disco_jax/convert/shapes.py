"""Infers the backbone in a state dict from the shapes of its arrays."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from disco_jax import errors, models
from disco_jax.convert.names import Layout

State = Mapping[str, np.ndarray]

# (blocks per stage, whether blocks have three convolutions) -> ResNet.
_RESNETS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
    ((1, 1, 1), False): "resnet8",
    ((2, 2, 2), False): "resnet14",
    ((3, 3, 3), False): "resnet20",
}


def backbone_spec(state: State, layout: Layout, source: str) -> dict[str, Any]:
    """Returns the config fields backbone, width, stem and grid of a backbone's state dict.

    Raises:
      UserError: no backbone in `models.BACKBONES` has these shapes.
    """
    if layout.name.endswith("resnet"):
        spec = _resnet(state, layout)
    elif layout.name == "vit":
        spec = _vit(state)
    elif layout.name == "xcit":
        spec = _xcit(state)
    else:
        spec = _inverted(state, layout)
    if spec is None:
        raise errors.UserError(
            f"{source} holds a backbone in the layout {layout.name} that is none of "
            f"{', '.join(models.BACKBONES)}."
        )
    return {"width": 0, "stem": "", "grid": 0, **spec}


def _resnet(state: State, layout: Layout) -> dict[str, Any] | None:
    if layout.name == "tensorflow_resnet":
        width = len(state["conv2d.weight"])
        count = sum(key.startswith("conv2d") for key in state)
        if count != 53:
            return None
        return _wide("resnet50", width)
    prefix, first_stage = {
        "sequential_resnet": ("encoder.", 4),
        "lightly_resnet": ("", 4),
        "detectron2_resnet": ("res", 2),
    }.get(layout.name, ("layer", 1))
    sizes = tuple(n for n in (_count(state, f"{prefix}{first_stage + i}") for i in range(4)) if n)
    stem = state[layout.signature[0]]
    name = _RESNETS.get((sizes, f"{prefix}{first_stage}.0.conv3.weight" in state))
    if name is None:
        return None
    spec = _wide(name, len(stem))
    default = models.BACKBONES[spec["backbone"]][1]["stem"]
    kind = "small" if stem.shape[-1] == 3 else "imagenet"
    return {**spec, "stem": "" if kind == default else kind}


def _wide(name: str, width: int) -> dict[str, Any]:
    """Returns the ResNet variant with `width` channels in its first stage."""
    wider = f"{name}w{width // 64}"
    if width == models.BACKBONES[name][1]["width"]:
        return {"backbone": name}
    if wider in models.BACKBONES and models.BACKBONES[wider][1]["width"] == width:
        return {"backbone": wider}
    return {"backbone": name, "width": width}


def _inverted(state: State, layout: Layout) -> dict[str, Any] | None:
    only_variant = {
        "sslight_mobilenetv2": "mobilenetv2",
        "torchvision_mobilenetv2": "mobilenetv2",
        "seed_mobilenetv3": "mobilenetv3_large_seed",
        "torchvision_mobilenetv3": "mobilenetv3_large_tv",
    }
    if layout.name in only_variant:
        return {"backbone": only_variant[layout.name]}
    if layout.name == "timm_inverted" and "bn2.weight" not in state:
        return {"backbone": "mobilenetv3_large"}
    if layout.name == "timm_inverted" and not any(".se." in key for key in state):
        return {"backbone": "mobilenetv2"}
    if layout.name == "lukemelas_efficientnet":
        name = {16: "efficientnet_b0_seed", 23: "efficientnet_b1_seed"}.get(
            _count(state, "_blocks")
        )
    else:
        root = "blocks" if layout.name == "timm_inverted" else "features"
        first = 0 if root == "blocks" else 1
        counts = tuple(_count(state, f"{root}.{first + s}") for s in range(7))
        name = {
            tuple(models.BACKBONES[n][1]["repeats"]): n
            for n in ("efficientnet_b0", "efficientnet_b1")
        }.get(counts)
    return {"backbone": name} if name else None


def _vit(state: State) -> dict[str, Any] | None:
    if any(np.ndim(state.get(key, 0)) != 3 for key in ("cls_token", "pos_embed")):
        return None
    fields = {
        "width": state["cls_token"].shape[-1],
        "patch": state["patch_embed.proj.weight"].shape[-1],
        "depth": _count(state, "blocks"),
    }
    grid = round(max(state["pos_embed"].shape[1] - 1, 0) ** 0.5)
    return _matching("vit", {"patch": 16, "depth": 12}, fields, grid)


def _xcit(state: State) -> dict[str, Any] | None:
    if np.ndim(state.get("cls_token", 0)) != 3:
        return None
    convs = len([k for k in state if re.fullmatch(r"patch_embed\.proj\.\d+\.0\.weight", k)])
    fields = {
        "width": state["cls_token"].shape[-1],
        "patch": 2**convs,
        "depth": _count(state, "blocks"),
    }
    return _matching("xcit", {"patch": 16, "depth": 12}, fields)


def _matching(
    family: str, defaults: dict[str, Any], fields: dict[str, Any], grid: int = 0
) -> dict[str, Any] | None:
    """Returns the first variant of a family that has these fields; None if there is none."""
    for name, (_, variant) in models.BACKBONES.items():
        variant = {**defaults, **variant}
        if name.startswith(family) and all(variant[k] == v for k, v in fields.items()):
            is_default = grid in (0, variant.get("grid", 14))
            return {"backbone": name, "grid": 0 if is_default else grid}
    return None


def _count(state: Iterable[str], root: str) -> int:
    """Returns the number of numbered children under `root`."""
    pattern = re.compile(re.escape(root) + r"\.(\d+)\.")
    return len({match[1] for key in state if (match := pattern.match(key))})
