"""Vision transformers in the layout of DINO and timm."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from disco_jax import models
from disco_jax.convert.backbones.transformer import attention_mlp
from disco_jax.convert.backbones.variants import variants
from disco_jax.convert.family import Export, Family, Layout, State, count_children
from disco_jax.convert.names import ModuleMap
from disco_jax.models.backbones.vit import VARIANTS, ViT


def dino(net: ViT) -> Iterator[ModuleMap]:
    """Yields the modules of DINO's and timm's vision transformers."""
    yield ModuleMap("cls_token", "cls_token", "array")
    yield ModuleMap("pos_embed", "pos_embed", "array")
    yield ModuleMap("patch_embed.proj", "patch_conv", "conv")
    for i in range(net.depth):
        yield from attention_mlp(f"blocks.{i}", f"block{i}")
    yield ModuleMap("norm", "norm", "layer_norm")


def _spec(state: State) -> dict[str, Any] | None:
    if any(np.ndim(state.get(key, 0)) != 3 for key in ("cls_token", "pos_embed")):
        return None
    names = variants(
        ViT,
        width=state["cls_token"].shape[-1],
        patch=state["patch_embed.proj.weight"].shape[-1],
        depth=count_children(state, "blocks"),
    )
    if not names:
        return None
    grid = round(max(state["pos_embed"].shape[1] - 1, 0) ** 0.5)
    default = ViT(**models.BACKBONES[names[0]][1]).grid
    return {"backbone": names[0], "grid": 0 if grid in (0, default) else grid}


def _default(state: State) -> str:
    return "timm" if "head.weight" in state else "dino"


_TIMM = {
    "vit_tiny_p16": "vit_tiny_patch16_224",
    "vit_tiny_p32": "",
    "vit_small_p16": "vit_small_patch16_224",
    "vit_small_p8": "vit_small_patch8_224",
    "vit_base_p16": "vit_base_patch16_224",
    "vit_base_p8": "vit_base_patch8_224",
}

FAMILY = Family(
    priority=4,
    layouts=(
        Layout(
            "vit",
            ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
            dino,
            _spec,
            default=_default,
        ),
    ),
    exports={
        "timm": {name: Export(dino, model, "head") for name, model in _TIMM.items()},
        "moco": {name: Export(dino, classifier="head") for name in VARIANTS},
    },
    aliases={
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
    },
    refused={
        ("moco_v3", name): (
            f"holds MoCo-v3's ViT-S, which has 12 attention heads, and {name} has 6: the weights "
            "would compute other features here."
        )
        for name in ("vit_small_p16", "vit_small_p8")
    },
)
