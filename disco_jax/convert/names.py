"""How the PyTorch world names the weights of our backbones: one function a layout.

Each walks a backbone of ours and yields, module by module, their name and ours, so that a table
reads a checkpoint and writes one. `LAYOUTS`, at the end, lists them with the key that gives each
away, to recognise by.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from disco_jax.models.backbones import efficientnet


class Name(NamedTuple):
    """One module in both worlds.

    Attributes:
      theirs: dotted, relative to the backbone.
      ours: path in the variables, with slashes.
      kind: a key of `LEAVES`.
    """

    theirs: str
    ours: str
    kind: str


class Leaf(NamedTuple):
    """One array of a module in both worlds.

    Attributes:
      theirs: its name behind the module's; "" where the module is the array.
      ours: (collection, name).
      load: their array -> ours.
      save: back.
    """

    theirs: str
    ours: tuple[str, str]
    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _transposed(x: np.ndarray) -> np.ndarray:
    return x.T


_BIAS = Leaf("bias", ("params", "bias"), _same, _same)
_SCALE = Leaf("weight", ("params", "scale"), _same, _same)
LEAVES = {
    "conv": (
        # OIHW <-> HWIO; of a depthwise one I is 1.
        Leaf(
            "weight",
            ("params", "kernel"),
            lambda x: x.transpose(2, 3, 1, 0),
            lambda x: x.transpose(3, 2, 0, 1),
        ),
        _BIAS,
    ),
    "linear": (Leaf("weight", ("params", "kernel"), _transposed, _transposed), _BIAS),
    # A linear layer of ours that is a 1x1 convolution there.
    "linear1x1": (
        Leaf(
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
        Leaf("running_mean", ("batch_stats", "mean"), _same, _same),
        Leaf("running_var", ("batch_stats", "var"), _same, _same),
    ),
    "layer_norm": (_SCALE, _BIAS),
    "array": (Leaf("", ("params", ""), _same, _same),),
}


def torchvision_resnet(net: Any) -> Iterator[Name]:
    """torchvision's and timm's ResNets, and all that are made of them."""
    yield Name("conv1", "conv1", "conv")
    yield Name("bn1", "bn1", "batch_norm")
    for stage, i, ours, convs, shortcut in _residual_blocks(net):
        block = f"layer{stage + 1}.{i}"
        for n in range(1, convs + 1):
            yield Name(f"{block}.conv{n}", f"{ours}/conv{n}", "conv")
            yield Name(f"{block}.bn{n}", f"{ours}/bn{n}", "batch_norm")
        if shortcut:
            yield Name(f"{block}.downsample.0", f"{ours}/downsample_conv", "conv")
            yield Name(f"{block}.downsample.1", f"{ours}/downsample_bn", "batch_norm")


def lightly_resnet(net: Any) -> Iterator[Name]:
    """Lightly's: torchvision's children in a row, counted with the activation and the pool."""
    place = {"conv1": "0", "bn1": "1", **{f"layer{n}": str(n + 3) for n in range(1, 5)}}
    for name in torchvision_resnet(net):
        first, dot, rest = name.theirs.partition(".")
        yield name._replace(theirs=f"{place[first]}{dot}{rest}")


def sequential_resnet(net: Any) -> Iterator[Name]:
    """SSLight's: the same under another name."""
    for name in lightly_resnet(net):
        yield name._replace(theirs=f"encoder.{name.theirs}")


def tensorflow_resnet(net: Any) -> Iterator[Name]:
    """SimCLR's, ported: convolutions counted through, the shortcut of a stage first."""
    count = 0

    def pair(conv: str, norm: str) -> Iterator[Name]:
        nonlocal count
        suffix = f"_{count}" if count else ""
        yield Name(f"conv2d{suffix}", conv, "conv")
        yield Name(f"batch_normalization{suffix}", norm, "batch_norm")
        count += 1

    yield from pair("conv1", "bn1")
    for _, _, ours, convs, shortcut in _residual_blocks(net):
        if shortcut:
            yield from pair(f"{ours}/downsample_conv", f"{ours}/downsample_bn")
        for n in range(1, convs + 1):
            yield from pair(f"{ours}/conv{n}", f"{ours}/bn{n}")


def detectron2_resnet(net: Any) -> Iterator[Name]:
    """Detectron2's: norms belong to their convolutions."""
    yield Name("stem.conv1", "conv1", "conv")
    yield Name("stem.conv1.norm", "bn1", "batch_norm")
    for stage, i, ours, convs, shortcut in _residual_blocks(net):
        block = f"res{stage + 2}.{i}"
        for n in range(1, convs + 1):
            yield Name(f"{block}.conv{n}", f"{ours}/conv{n}", "conv")
            yield Name(f"{block}.conv{n}.norm", f"{ours}/bn{n}", "batch_norm")
        if shortcut:
            yield Name(f"{block}.shortcut", f"{ours}/downsample_conv", "conv")
            yield Name(f"{block}.shortcut.norm", f"{ours}/downsample_bn", "batch_norm")


def timm_inverted(net: Any) -> Iterator[Name]:
    """timm's EfficientNets and MobileNets, DisCo's among them."""
    yield Name("conv_stem", "stem_conv", "conv")
    yield Name("bn1", "stem_bn", "batch_norm")
    for s, i, ours, expands, squeeze in _inverted_blocks(net):
        block = f"blocks.{s}.{i}"
        project = "conv_pwl" if expands else "conv_pw"
        parts = [("conv_dw", "depthwise"), (project, "project")]
        if expands:
            parts.insert(0, ("conv_pw", "expand"))
        for n, (conv, part) in enumerate(parts, 1):
            yield Name(f"{block}.{conv}", f"{ours}/{part}_conv", "conv")
            yield Name(f"{block}.bn{n}", f"{ours}/{part}_bn", "batch_norm")
        if squeeze:
            yield Name(f"{block}.se.conv_reduce", f"{ours}/squeeze/reduce", "linear1x1")
            yield Name(f"{block}.se.conv_expand", f"{ours}/squeeze/expand", "linear1x1")
    if getattr(net, "tail_linear", False):
        last = f"blocks.{len(net.blocks())}.0"
        yield Name(f"{last}.conv", "tail_conv", "conv")
        yield Name(f"{last}.bn1", "tail_bn", "batch_norm")
        yield Name("conv_head", "tail_linear", "linear1x1")
    else:
        yield Name("conv_head", f"{_tail(net)}_conv", "conv")
        yield Name("bn2", f"{_tail(net)}_bn", "batch_norm")


def lukemelas_efficientnet(net: Any) -> Iterator[Name]:
    """The port of TensorFlow's that SEED and BINGO take."""
    yield Name("_conv_stem", "stem_conv", "conv")
    yield Name("_bn0", "stem_bn", "batch_norm")
    for n, (_, _, ours, expands, _) in enumerate(_inverted_blocks(net)):
        block = f"_blocks.{n}"
        if expands:
            yield Name(f"{block}._expand_conv", f"{ours}/expand_conv", "conv")
            yield Name(f"{block}._bn0", f"{ours}/expand_bn", "batch_norm")
        yield Name(f"{block}._depthwise_conv", f"{ours}/depthwise_conv", "conv")
        yield Name(f"{block}._bn1", f"{ours}/depthwise_bn", "batch_norm")
        yield Name(f"{block}._se_reduce", f"{ours}/squeeze/reduce", "linear1x1")
        yield Name(f"{block}._se_expand", f"{ours}/squeeze/expand", "linear1x1")
        yield Name(f"{block}._project_conv", f"{ours}/project_conv", "conv")
        yield Name(f"{block}._bn2", f"{ours}/project_bn", "batch_norm")
    yield Name("_conv_head", "head_conv", "conv")
    yield Name("_bn1", "head_bn", "batch_norm")


def torchvision_inverted(net: Any) -> Iterator[Name]:
    """torchvision's EfficientNets and MobileNetV3: features.N(.i).block.k."""
    yield from _conv_bn("features.0", "stem")
    nested = hasattr(net, "repeats")  # EfficientNet groups blocks by stage
    flat = list(_inverted_blocks(net))
    for n, (s, i, ours, expands, squeeze) in enumerate(flat):
        block = f"features.{s + 1}.{i}.block" if nested else f"features.{n + 1}.block"
        k = 0
        if expands:
            yield from _conv_bn(f"{block}.0", f"{ours}/expand")
            k = 1
        yield from _conv_bn(f"{block}.{k}", f"{ours}/depthwise")
        if squeeze:
            k += 1
            yield Name(f"{block}.{k}.fc1", f"{ours}/squeeze/reduce", "linear1x1")
            yield Name(f"{block}.{k}.fc2", f"{ours}/squeeze/expand", "linear1x1")
        yield from _conv_bn(f"{block}.{k + 1}", f"{ours}/project")
    last = len(net.blocks()) if nested else len(flat)
    yield from _conv_bn(f"features.{last + 1}", _tail(net))
    if getattr(net, "tail_linear", False):
        yield Name("classifier.0", "tail_linear", "linear")


def torchvision_mobilenetv2(net: Any, first: str = "features") -> Iterator[Name]:
    """torchvision's MobileNetV2, which CompRess and SimReg take too."""
    yield from _conv_bn(f"{first}.0", "stem")
    flat = list(_inverted_blocks(net))
    for n, (_, _, ours, expands, _) in enumerate(flat, 1):
        block, k = f"{first}.{n}.conv", 0
        if expands:
            yield from _conv_bn(f"{block}.0", f"{ours}/expand")
            k = 1
        yield from _conv_bn(f"{block}.{k}", f"{ours}/depthwise")
        yield Name(f"{block}.{k + 1}", f"{ours}/project_conv", "conv")
        yield Name(f"{block}.{k + 2}", f"{ours}/project_bn", "batch_norm")
    yield from _conv_bn(f"{first}.{len(flat) + 1}", "tail")


def sslight_mobilenetv2(net: Any) -> Iterator[Name]:
    """SSLight's: torchvision's under another name."""
    return torchvision_mobilenetv2(net, "encoder")


def seed_mobilenetv3(net: Any) -> Iterator[Name]:
    """SEED's own MobileNetV3."""
    yield from _conv_bn("features.0", "stem")
    for n, (_, _, ours, expands, squeeze) in enumerate(_inverted_blocks(net), 1):
        block = f"features.{n}.conv"
        parts = {"expand": 0, "depthwise": 3, "project": 7} if expands else None
        for part, k in (parts or {"depthwise": 0, "project": 4}).items():
            yield Name(f"{block}.{k}", f"{ours}/{part}_conv", "conv")
            yield Name(f"{block}.{k + 1}", f"{ours}/{part}_bn", "batch_norm")
        if squeeze:
            k = 5 if expands else 3
            yield Name(f"{block}.{k}.fc.0", f"{ours}/squeeze/reduce", "linear")
            yield Name(f"{block}.{k}.fc.2", f"{ours}/squeeze/expand", "linear")
    yield from _conv_bn("conv", "tail")
    yield Name("classifier.0", "tail_linear", "linear")


def dino_vit(net: Any) -> Iterator[Name]:
    """DINO's and timm's vision transformers."""
    yield Name("cls_token", "cls_token", "array")
    yield Name("pos_embed", "pos_embed", "array")
    yield Name("patch_embed.proj", "patch_conv", "conv")
    for i in range(net.depth):
        yield from _attention(f"blocks.{i}", f"block{i}")
    yield Name("norm", "norm", "layer_norm")


def xcit(net: Any) -> Iterator[Name]:
    """XCiT's own names; timm's are translated to them by `renamed`."""
    yield Name("cls_token", "cls_token", "array")
    for i in range(int(np.log2(net.patch))):
        yield Name(f"patch_embed.proj.{2 * i}.0", f"patch_conv{i}", "conv")
        yield Name(f"patch_embed.proj.{2 * i}.1", f"patch_bn{i}", "batch_norm")
    yield Name("pos_embeder.token_projection", "position", "linear1x1")
    for i in range(net.depth):
        theirs, ours = f"blocks.{i}", f"block{i}"
        yield from _attention(theirs, ours)
        yield Name(f"{theirs}.attn.temperature", f"{ours}/temperature", "array")
        yield Name(f"{theirs}.norm3", f"{ours}/norm3", "layer_norm")
        yield Name(f"{theirs}.local_mp.conv1", f"{ours}/local_conv1", "conv")
        yield Name(f"{theirs}.local_mp.bn", f"{ours}/local_bn", "batch_norm")
        yield Name(f"{theirs}.local_mp.conv2", f"{ours}/local_conv2", "conv")
        for n in (1, 2, 3):
            yield Name(f"{theirs}.gamma{n}", f"{ours}/gamma{n}", "array")
    for i in range(net.class_blocks):
        theirs, ours = f"cls_attn_blocks.{i}", f"cls_block{i}"
        yield from _attention(theirs, ours)
        for n in (1, 2):
            yield Name(f"{theirs}.gamma{n}", f"{ours}/gamma{n}", "array")
    yield Name("norm", "norm", "layer_norm")


def timm_xcit(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict in timm's XCiT names in the original ones: class attention's parts joined."""
    parts = re.compile(r"(.*cls_attn_blocks\.\d+\.attn)\.([qkv])\.(weight|bias)")
    renamed: dict[str, np.ndarray] = {}
    split: dict[str, dict[str, np.ndarray]] = {}
    for key, value in state.items():
        if match := parts.fullmatch(key):
            split.setdefault(f"{match[1]}.qkv.{match[3]}", {})[match[2]] = value
        else:
            key = key.replace("pos_embed.token_projection", "pos_embeder.token_projection")
            renamed[key] = value
    for key, found in split.items():
        fit = len({part.shape[1:] for part in found.values() if part.ndim}) == 1
        if set(found) == set("qkv") and fit and all(part.ndim for part in found.values()):
            renamed[key] = np.concatenate([found[part] for part in "qkv"])
    return renamed


def to_timm_xcit(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The reverse of `timm_xcit`."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("pos_embeder.token_projection", "pos_embed.token_projection")
        if "cls_attn_blocks" in key and ".qkv." in key:
            for part, third in zip("qkv", np.split(value, 3), strict=True):
                renamed[key.replace(".qkv.", f".{part}.")] = third
        else:
            renamed[key] = value
    return renamed


def _attention(theirs: str, ours: str) -> Iterator[Name]:
    """Attention and MLP of one block."""
    yield Name(f"{theirs}.norm1", f"{ours}/norm1", "layer_norm")
    yield Name(f"{theirs}.attn.qkv", f"{ours}/qkv", "linear")
    yield Name(f"{theirs}.attn.proj", f"{ours}/proj", "linear")
    yield Name(f"{theirs}.norm2", f"{ours}/norm2", "layer_norm")
    yield Name(f"{theirs}.mlp.fc1", f"{ours}/mlp/fc1", "linear")
    yield Name(f"{theirs}.mlp.fc2", f"{ours}/mlp/fc2", "linear")


def _conv_bn(theirs: str, ours: str) -> Iterator[Name]:
    """A sequence of a convolution and its BatchNorm."""
    yield Name(f"{theirs}.0", f"{ours}_conv", "conv")
    yield Name(f"{theirs}.1", f"{ours}_bn", "batch_norm")


def _tail(net: Any) -> str:
    return "head" if hasattr(net, "repeats") else "tail"


def _residual_blocks(net: Any) -> Iterator[tuple[int, int, str, int, bool]]:
    """(stage, block of it, our name, convolutions, has a shortcut) of a ResNet."""
    convs = 3 if net.block == "bottleneck" else 2
    for stage, size in enumerate(net.stage_sizes):
        for i in range(size):
            shortcut = i == 0 and (stage > 0 or convs == 3)
            yield stage, i, f"layer{stage + 1}_{i}", convs, shortcut


def _inverted_blocks(net: Any) -> Iterator[tuple[int, int, str, bool, bool]]:
    """(stage, block of it, our name, expands, squeezes) of a network of inverted residuals."""
    width = getattr(net, "stem_width", efficientnet.STEM)
    for s, blocks in enumerate(net.blocks()):
        for i, block in enumerate(blocks):
            yield s, i, f"block{s}_{i}", block.expanded != width, bool(block.squeeze)
            width = block.channels


class Layout(NamedTuple):
    """A way to name the weights of a family of backbones.

    Attributes:
      name: for manifests and messages.
      signature: keys that a state dict in this layout has, relative to the backbone.
      names: a backbone of ours -> its modules in both worlds.
    """

    name: str
    signature: tuple[str, ...]
    names: Callable[[Any], Iterator[Name]]


# The first whose signature is there is taken, so the more telling stand first.
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
