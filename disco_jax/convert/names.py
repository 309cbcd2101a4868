"""Maps the weights' names in PyTorch code bases to this package's: one function per layout.

Each function walks a backbone and yields its modules under both names, so that one table serves
reading and writing. `LAYOUTS` lists the functions with the keys that identify each layout.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from disco_jax.models import efficientnet


class ModuleMap(NamedTuple):
    """One module under its PyTorch and its Flax name.

    Attributes:
      torch: its name with dots, relative to the backbone.
      flax: its path in the variables, with slashes.
      kind: a key of `PARAM_MAPS`.
    """

    torch: str
    flax: str
    kind: str


class ParamMap(NamedTuple):
    """One array of a module under its PyTorch and its Flax name.

    Attributes:
      torch: its name relative to the module's; "" if the module is the array.
      flax: (collection, name).
      load: converts an array from PyTorch's layout to Flax's.
      save: the inverse of `load`.
    """

    torch: str
    flax: tuple[str, str]
    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _transposed(x: np.ndarray) -> np.ndarray:
    return x.T


_BIAS = ParamMap("bias", ("params", "bias"), _same, _same)
_SCALE = ParamMap("weight", ("params", "scale"), _same, _same)
PARAM_MAPS = {
    "conv": (
        # OIHW <-> HWIO; in a depthwise convolution I is 1.
        ParamMap(
            "weight",
            ("params", "kernel"),
            lambda x: x.transpose(2, 3, 1, 0),
            lambda x: x.transpose(3, 2, 0, 1),
        ),
        _BIAS,
    ),
    "linear": (ParamMap("weight", ("params", "kernel"), _transposed, _transposed), _BIAS),
    # A 1x1 convolution in PyTorch, a linear layer in Flax.
    "linear1x1": (
        ParamMap(
            "weight",
            ("params", "kernel"),
            lambda x: x.reshape(x.shape[:2]).T,
            lambda x: x.T[:, :, None, None],
        ),
        _BIAS,
    ),
    "batch_norm": (
        _SCALE,
        _BIAS,
        ParamMap("running_mean", ("batch_stats", "mean"), _same, _same),
        ParamMap("running_var", ("batch_stats", "var"), _same, _same),
    ),
    "layer_norm": (_SCALE, _BIAS),
    "array": (ParamMap("", ("params", ""), _same, _same),),
}


def torchvision_resnet(net: Any) -> Iterator[ModuleMap]:
    """Yields the modules of torchvision's and timm's ResNets and of their derivatives."""
    yield ModuleMap("conv1", "conv1", "conv")
    yield ModuleMap("bn1", "bn1", "batch_norm")
    for stage, i, flax, convs, shortcut in _residual_blocks(net):
        block = f"layer{stage + 1}.{i}"
        for n in range(1, convs + 1):
            yield ModuleMap(f"{block}.conv{n}", f"{flax}/conv{n}", "conv")
            yield ModuleMap(f"{block}.bn{n}", f"{flax}/bn{n}", "batch_norm")
        if shortcut:
            yield ModuleMap(f"{block}.downsample.0", f"{flax}/downsample_conv", "conv")
            yield ModuleMap(f"{block}.downsample.1", f"{flax}/downsample_bn", "batch_norm")


def lightly_resnet(net: Any) -> Iterator[ModuleMap]:
    """Yields the modules of Lightly's ResNets.

    They are torchvision's children as one sequence, which counts the activation and the pool.
    """
    index = {"conv1": "0", "bn1": "1", **{f"layer{n}": str(n + 3) for n in range(1, 5)}}
    for module in torchvision_resnet(net):
        first, dot, rest = module.torch.partition(".")
        yield module._replace(torch=f"{index[first]}{dot}{rest}")


def sequential_resnet(net: Any) -> Iterator[ModuleMap]:
    """Yields the modules of SSLight's ResNets: Lightly's under `encoder`."""
    for module in lightly_resnet(net):
        yield module._replace(torch=f"encoder.{module.torch}")


def tensorflow_resnet(net: Any) -> Iterator[ModuleMap]:
    """Yields the modules of SimCLR's ResNets, ported from TensorFlow.

    Convolutions are numbered consecutively, and the shortcut of a stage precedes its first block.
    """
    count = 0

    def pair(conv: str, norm: str) -> Iterator[ModuleMap]:
        nonlocal count
        suffix = f"_{count}" if count else ""
        yield ModuleMap(f"conv2d{suffix}", conv, "conv")
        yield ModuleMap(f"batch_normalization{suffix}", norm, "batch_norm")
        count += 1

    yield from pair("conv1", "bn1")
    for _, _, flax, convs, shortcut in _residual_blocks(net):
        if shortcut:
            yield from pair(f"{flax}/downsample_conv", f"{flax}/downsample_bn")
        for n in range(1, convs + 1):
            yield from pair(f"{flax}/conv{n}", f"{flax}/bn{n}")


def detectron2_resnet(net: Any) -> Iterator[ModuleMap]:
    """Yields the modules of Detectron2's ResNets, where norms belong to their convolutions."""
    yield ModuleMap("stem.conv1", "conv1", "conv")
    yield ModuleMap("stem.conv1.norm", "bn1", "batch_norm")
    for stage, i, flax, convs, shortcut in _residual_blocks(net):
        block = f"res{stage + 2}.{i}"
        for n in range(1, convs + 1):
            yield ModuleMap(f"{block}.conv{n}", f"{flax}/conv{n}", "conv")
            yield ModuleMap(f"{block}.conv{n}.norm", f"{flax}/bn{n}", "batch_norm")
        if shortcut:
            yield ModuleMap(f"{block}.shortcut", f"{flax}/downsample_conv", "conv")
            yield ModuleMap(f"{block}.shortcut.norm", f"{flax}/downsample_bn", "batch_norm")


def timm_inverted(net: Any) -> Iterator[ModuleMap]:
    """Yields the modules of timm's EfficientNets and MobileNets, which DisCo uses."""
    yield ModuleMap("conv_stem", "stem_conv", "conv")
    yield ModuleMap("bn1", "stem_bn", "batch_norm")
    for s, i, flax, expands, squeeze in _inverted_blocks(net):
        block = f"blocks.{s}.{i}"
        project = "conv_pwl" if expands else "conv_pw"
        parts = [("conv_dw", "depthwise"), (project, "project")]
        if expands:
            parts.insert(0, ("conv_pw", "expand"))
        for n, (conv, part) in enumerate(parts, 1):
            yield ModuleMap(f"{block}.{conv}", f"{flax}/{part}_conv", "conv")
            yield ModuleMap(f"{block}.bn{n}", f"{flax}/{part}_bn", "batch_norm")
        if squeeze:
            yield ModuleMap(f"{block}.se.conv_reduce", f"{flax}/squeeze/reduce", "linear1x1")
            yield ModuleMap(f"{block}.se.conv_expand", f"{flax}/squeeze/expand", "linear1x1")
    if getattr(net, "tail_linear", False):
        last = f"blocks.{len(net.blocks())}.0"
        yield ModuleMap(f"{last}.conv", "tail_conv", "conv")
        yield ModuleMap(f"{last}.bn1", "tail_bn", "batch_norm")
        yield ModuleMap("conv_head", "tail_linear", "linear1x1")
    else:
        yield ModuleMap("conv_head", f"{_tail(net)}_conv", "conv")
        yield ModuleMap("bn2", f"{_tail(net)}_bn", "batch_norm")


def lukemelas_efficientnet(net: Any) -> Iterator[ModuleMap]:
    """Yields the modules of the TensorFlow port that SEED and BINGO use."""
    yield ModuleMap("_conv_stem", "stem_conv", "conv")
    yield ModuleMap("_bn0", "stem_bn", "batch_norm")
    for n, (_, _, flax, expands, _) in enumerate(_inverted_blocks(net)):
        block = f"_blocks.{n}"
        if expands:
            yield ModuleMap(f"{block}._expand_conv", f"{flax}/expand_conv", "conv")
            yield ModuleMap(f"{block}._bn0", f"{flax}/expand_bn", "batch_norm")
        yield ModuleMap(f"{block}._depthwise_conv", f"{flax}/depthwise_conv", "conv")
        yield ModuleMap(f"{block}._bn1", f"{flax}/depthwise_bn", "batch_norm")
        yield ModuleMap(f"{block}._se_reduce", f"{flax}/squeeze/reduce", "linear1x1")
        yield ModuleMap(f"{block}._se_expand", f"{flax}/squeeze/expand", "linear1x1")
        yield ModuleMap(f"{block}._project_conv", f"{flax}/project_conv", "conv")
        yield ModuleMap(f"{block}._bn2", f"{flax}/project_bn", "batch_norm")
    yield ModuleMap("_conv_head", "head_conv", "conv")
    yield ModuleMap("_bn1", "head_bn", "batch_norm")


def torchvision_inverted(net: Any) -> Iterator[ModuleMap]:
    """Yields the modules of torchvision's EfficientNets and MobileNetV3: features.N(.i).block.k."""
    yield from _conv_bn("features.0", "stem")
    nested = hasattr(net, "repeats")  # torchvision's EfficientNet groups blocks by stage
    blocks = list(_inverted_blocks(net))
    for n, (s, i, flax, expands, squeeze) in enumerate(blocks):
        block = f"features.{s + 1}.{i}.block" if nested else f"features.{n + 1}.block"
        layer = 0
        if expands:
            yield from _conv_bn(f"{block}.0", f"{flax}/expand")
            layer = 1
        yield from _conv_bn(f"{block}.{layer}", f"{flax}/depthwise")
        if squeeze:
            layer += 1
            yield ModuleMap(f"{block}.{layer}.fc1", f"{flax}/squeeze/reduce", "linear1x1")
            yield ModuleMap(f"{block}.{layer}.fc2", f"{flax}/squeeze/expand", "linear1x1")
        yield from _conv_bn(f"{block}.{layer + 1}", f"{flax}/project")
    last = len(net.blocks()) if nested else len(blocks)
    yield from _conv_bn(f"features.{last + 1}", _tail(net))
    if getattr(net, "tail_linear", False):
        yield ModuleMap("classifier.0", "tail_linear", "linear")


def torchvision_mobilenetv2(net: Any, root: str = "features") -> Iterator[ModuleMap]:
    """Yields the modules of torchvision's MobileNetV2, which CompRess and SimReg use too."""
    yield from _conv_bn(f"{root}.0", "stem")
    flat = list(_inverted_blocks(net))
    for n, (_, _, flax, expands, _) in enumerate(flat, 1):
        block, k = f"{root}.{n}.conv", 0
        if expands:
            yield from _conv_bn(f"{block}.0", f"{flax}/expand")
            k = 1
        yield from _conv_bn(f"{block}.{k}", f"{flax}/depthwise")
        yield ModuleMap(f"{block}.{k + 1}", f"{flax}/project_conv", "conv")
        yield ModuleMap(f"{block}.{k + 2}", f"{flax}/project_bn", "batch_norm")
    yield from _conv_bn(f"{root}.{len(flat) + 1}", "tail")


def sslight_mobilenetv2(net: Any) -> Iterator[ModuleMap]:
    """Yields the modules of SSLight's MobileNetV2: torchvision's under `encoder`."""
    return torchvision_mobilenetv2(net, "encoder")


def seed_mobilenetv3(net: Any) -> Iterator[ModuleMap]:
    """Yields the modules of SEED's MobileNetV3."""
    yield from _conv_bn("features.0", "stem")
    for n, (_, _, flax, expands, squeeze) in enumerate(_inverted_blocks(net), 1):
        block = f"features.{n}.conv"
        parts = {"expand": 0, "depthwise": 3, "project": 7} if expands else None
        for part, k in (parts or {"depthwise": 0, "project": 4}).items():
            yield ModuleMap(f"{block}.{k}", f"{flax}/{part}_conv", "conv")
            yield ModuleMap(f"{block}.{k + 1}", f"{flax}/{part}_bn", "batch_norm")
        if squeeze:
            k = 5 if expands else 3
            yield ModuleMap(f"{block}.{k}.fc.0", f"{flax}/squeeze/reduce", "linear")
            yield ModuleMap(f"{block}.{k}.fc.2", f"{flax}/squeeze/expand", "linear")
    yield from _conv_bn("conv", "tail")
    yield ModuleMap("classifier.0", "tail_linear", "linear")


def dino_vit(net: Any) -> Iterator[ModuleMap]:
    """Yields the modules of DINO's and timm's vision transformers."""
    yield ModuleMap("cls_token", "cls_token", "array")
    yield ModuleMap("pos_embed", "pos_embed", "array")
    yield ModuleMap("patch_embed.proj", "patch_conv", "conv")
    for i in range(net.depth):
        yield from _attention(f"blocks.{i}", f"block{i}")
    yield ModuleMap("norm", "norm", "layer_norm")


def xcit(net: Any) -> Iterator[ModuleMap]:
    """Yields the modules of XCiT under its authors' names; `timm_xcit` translates timm's."""
    yield ModuleMap("cls_token", "cls_token", "array")
    for i in range(int(np.log2(net.patch))):
        yield ModuleMap(f"patch_embed.proj.{2 * i}.0", f"patch_conv{i}", "conv")
        yield ModuleMap(f"patch_embed.proj.{2 * i}.1", f"patch_bn{i}", "batch_norm")
    yield ModuleMap("pos_embeder.token_projection", "position", "linear1x1")
    for i in range(net.depth):
        torch, flax = f"blocks.{i}", f"block{i}"
        yield from _attention(torch, flax)
        yield ModuleMap(f"{torch}.attn.temperature", f"{flax}/temperature", "array")
        yield ModuleMap(f"{torch}.norm3", f"{flax}/norm3", "layer_norm")
        yield ModuleMap(f"{torch}.local_mp.conv1", f"{flax}/local_conv1", "conv")
        yield ModuleMap(f"{torch}.local_mp.bn", f"{flax}/local_bn", "batch_norm")
        yield ModuleMap(f"{torch}.local_mp.conv2", f"{flax}/local_conv2", "conv")
        for n in (1, 2, 3):
            yield ModuleMap(f"{torch}.gamma{n}", f"{flax}/gamma{n}", "array")
    for i in range(net.class_blocks):
        torch, flax = f"cls_attn_blocks.{i}", f"cls_block{i}"
        yield from _attention(torch, flax)
        for n in (1, 2):
            yield ModuleMap(f"{torch}.gamma{n}", f"{flax}/gamma{n}", "array")
    yield ModuleMap("norm", "norm", "layer_norm")


def timm_xcit(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Translates timm's XCiT names to the authors' and joins q, k and v of class attention."""
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


def to_timm_xcit(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Translates the authors' XCiT names to timm's: the inverse of `timm_xcit`."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("pos_embeder.token_projection", "pos_embed.token_projection")
        if "cls_attn_blocks" in key and ".qkv." in key:
            for part, third in zip("qkv", np.split(value, 3), strict=True):
                renamed[key.replace(".qkv.", f".{part}.")] = third
        else:
            renamed[key] = value
    return renamed


def _attention(torch: str, flax: str) -> Iterator[ModuleMap]:
    """Yields attention and MLP of one block."""
    yield ModuleMap(f"{torch}.norm1", f"{flax}/norm1", "layer_norm")
    yield ModuleMap(f"{torch}.attn.qkv", f"{flax}/qkv", "linear")
    yield ModuleMap(f"{torch}.attn.proj", f"{flax}/proj", "linear")
    yield ModuleMap(f"{torch}.norm2", f"{flax}/norm2", "layer_norm")
    yield ModuleMap(f"{torch}.mlp.fc1", f"{flax}/mlp/fc1", "linear")
    yield ModuleMap(f"{torch}.mlp.fc2", f"{flax}/mlp/fc2", "linear")


def _conv_bn(torch: str, flax: str) -> Iterator[ModuleMap]:
    """Yields a sequence of a convolution and its BatchNorm."""
    yield ModuleMap(f"{torch}.0", f"{flax}_conv", "conv")
    yield ModuleMap(f"{torch}.1", f"{flax}_bn", "batch_norm")


def _tail(net: Any) -> str:
    return "head" if hasattr(net, "repeats") else "tail"


def _residual_blocks(net: Any) -> Iterator[tuple[int, int, str, int, bool]]:
    """Yields (stage, index in it, Flax name, convolutions, has a shortcut) per ResNet block."""
    convs = 3 if net.block == "bottleneck" else 2
    for stage, size in enumerate(net.stage_sizes):
        for i in range(size):
            shortcut = i == 0 and (stage > 0 or convs == 3)
            yield stage, i, f"layer{stage + 1}_{i}", convs, shortcut


def _inverted_blocks(net: Any) -> Iterator[tuple[int, int, str, bool, bool]]:
    """Yields (stage, index in it, Flax name, expands, squeezes) per inverted residual block."""
    width = getattr(net, "stem_width", efficientnet.STEM)
    for s, blocks in enumerate(net.blocks()):
        for i, block in enumerate(blocks):
            yield s, i, f"block{s}_{i}", block.expanded != width, bool(block.squeeze)
            width = block.channels


class Layout(NamedTuple):
    """A naming of the weights of a family of backbones.

    Attributes:
      name: for manifests and messages.
      signature: keys that every state dict in this layout has, relative to the backbone.
      modules: yields the modules of a backbone under both names.
    """

    name: str
    signature: tuple[str, ...]
    modules: Callable[[Any], Iterator[ModuleMap]]


# Searched in order: the first layout whose signature is present is used.
LAYOUTS = (
    Layout("torchvision_resnet", ("conv1.weight", "layer1.0.conv1.weight"), torchvision_resnet),
    Layout(
        "sequential_resnet", ("encoder.0.weight", "encoder.4.0.conv1.weight"), sequential_resnet
    ),
    Layout("lightly_resnet", ("0.weight", "4.0.conv1.weight"), lightly_resnet),
    Layout("tensorflow_resnet", ("conv2d.weight", "conv2d_1.weight"), tensorflow_resnet),
    Layout(
        "detectron2_resnet", ("stem.conv1.weight", "res2.0.conv1.norm.weight"), detectron2_resnet
    ),
    Layout("timm_inverted", ("conv_stem.weight",), timm_inverted),
    Layout("lukemelas_efficientnet", ("_conv_stem.weight",), lukemelas_efficientnet),
    Layout(
        "sslight_mobilenetv2",
        ("encoder.0.0.weight", "encoder.1.conv.0.0.weight"),
        sslight_mobilenetv2,
    ),
    Layout(
        "torchvision_mobilenetv2",
        ("features.0.0.weight", "features.1.conv.0.0.weight"),
        torchvision_mobilenetv2,
    ),
    Layout(
        "seed_mobilenetv3", ("features.0.0.weight", "features.1.conv.0.weight"), seed_mobilenetv3
    ),
    Layout(
        "torchvision_mobilenetv3",
        ("features.0.0.weight", "features.1.block.0.0.weight"),
        torchvision_inverted,
    ),
    Layout(
        "torchvision_efficientnet",
        ("features.0.0.weight", "features.1.0.block.0.0.weight"),
        torchvision_inverted,
    ),
    Layout("xcit", ("patch_embed.proj.0.0.weight", "cls_attn_blocks.0.norm1.weight"), xcit),
    Layout("vit", ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"), dino_vit),
)
