"""XCiT in the layout of its authors; timm's names are translated to theirs and back."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from disco_jax.convert.backbones.transformer import attention_mlp
from disco_jax.convert.backbones.variants import variants
from disco_jax.convert.family import Export, Family, Layout, State, count_children
from disco_jax.convert.names import ModuleMap
from disco_jax.models.backbones.xcit import VARIANTS, XCiT


def original(net: XCiT) -> Iterator[ModuleMap]:
    """Yields the modules of XCiT under its authors' names."""
    yield ModuleMap("cls_token", "cls_token", "array")
    for i in range(int(np.log2(net.patch))):
        yield ModuleMap(f"patch_embed.proj.{2 * i}.0", f"patch_conv{i}", "conv")
        yield ModuleMap(f"patch_embed.proj.{2 * i}.1", f"patch_bn{i}", "batch_norm")
    yield ModuleMap("pos_embeder.token_projection", "position", "linear1x1")
    for i in range(net.depth):
        torch, flax = f"blocks.{i}", f"block{i}"
        yield from attention_mlp(torch, flax)
        yield ModuleMap(f"{torch}.attn.temperature", f"{flax}/temperature", "array")
        yield ModuleMap(f"{torch}.norm3", f"{flax}/norm3", "layer_norm")
        yield ModuleMap(f"{torch}.local_mp.conv1", f"{flax}/local_conv1", "conv")
        yield ModuleMap(f"{torch}.local_mp.bn", f"{flax}/local_bn", "batch_norm")
        yield ModuleMap(f"{torch}.local_mp.conv2", f"{flax}/local_conv2", "conv")
        for n in (1, 2, 3):
            yield ModuleMap(f"{torch}.gamma{n}", f"{flax}/gamma{n}", "array")
    for i in range(net.class_blocks):
        torch, flax = f"cls_attn_blocks.{i}", f"cls_block{i}"
        yield from attention_mlp(torch, flax)
        for n in (1, 2):
            yield ModuleMap(f"{torch}.gamma{n}", f"{flax}/gamma{n}", "array")
    yield ModuleMap("norm", "norm", "layer_norm")


def from_timm(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Translates timm's names to the authors' and joins q, k and v of class attention."""
    parts = re.compile(r"(.*cls_attn_blocks\.\d+\.attn)\.([qkv])\.(weight|bias)")
    renamed: dict[str, np.ndarray] = {}
    split: dict[str, dict[str, np.ndarray]] = {}
    for key, value in state.items():
        if match := parts.fullmatch(key):
            split.setdefault(f"{match[1]}.qkv.{match[3]}", {})[match[2]] = value
        else:
            key = key.replace("pos_embed.token_projection", "pos_embeder.token_projection")
            renamed[key] = value
    for key, thirds in split.items():
        fit = len({third.shape[1:] for third in thirds.values() if third.ndim}) == 1
        if set(thirds) == set("qkv") and fit and all(third.ndim for third in thirds.values()):
            renamed[key] = np.concatenate([thirds[part] for part in "qkv"])
    return renamed


def to_timm(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Translates the authors' names to timm's: the inverse of `from_timm`."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("pos_embeder.token_projection", "pos_embed.token_projection")
        if "cls_attn_blocks" in key and ".qkv." in key:
            for part, third in zip("qkv", np.split(value, 3), strict=True):
                renamed[key.replace(".qkv.", f".{part}.")] = third
        else:
            renamed[key] = value
    return renamed


def _spec(state: State) -> dict[str, Any] | None:
    if np.ndim(state.get("cls_token", 0)) != 3:
        return None
    convs = len([k for k in state if re.fullmatch(r"patch_embed\.proj\.\d+\.0\.weight", k)])
    names = variants(
        XCiT,
        width=state["cls_token"].shape[-1],
        patch=2**convs,
        depth=count_children(state, "blocks"),
    )
    return {"backbone": names[0]} if names else None


FAMILY = Family(
    priority=3,
    layouts=(
        Layout(
            "xcit",
            ("patch_embed.proj.0.0.weight", "cls_attn_blocks.0.norm1.weight"),
            original,
            _spec,
            authors="dino",
        ),
    ),
    exports={
        "timm": {
            name: Export(original, f"{name}_224", "head", finish=to_timm) for name in VARIANTS
        },
        "moco": {name: Export(original, classifier="head") for name in VARIANTS},
    },
    aliases={"xcit_tiny": "xcit_tiny_12_p16", "xcit_small": "xcit_small_12_p16"},
    translate=from_timm,
)
