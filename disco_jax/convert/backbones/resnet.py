"""ResNets in the layouts of torchvision, Lightly, SSLight, TensorFlow and Detectron2."""

import functools
from collections.abc import Iterator
from typing import Any

from disco_jax import models
from disco_jax.convert.backbones.variants import variants
from disco_jax.convert.family import Export, Family, Layout, State, count_children
from disco_jax.convert.names import ModuleMap
from disco_jax.models.backbones.resnet import VARIANTS, ResNet

_TENSORFLOW_CONVOLUTIONS = 53  # of a ResNet-50, the only size that was ported


def torchvision(net: ResNet) -> Iterator[ModuleMap]:
    """Yields the modules of torchvision's and timm's ResNets and of their derivatives."""
    yield ModuleMap("conv1", "conv1", "conv")
    yield ModuleMap("bn1", "bn1", "batch_norm")
    for stage, i, flax, convs, shortcut in _blocks(net):
        block = f"layer{stage + 1}.{i}"
        for n in range(1, convs + 1):
            yield ModuleMap(f"{block}.conv{n}", f"{flax}/conv{n}", "conv")
            yield ModuleMap(f"{block}.bn{n}", f"{flax}/bn{n}", "batch_norm")
        if shortcut:
            yield ModuleMap(f"{block}.downsample.0", f"{flax}/downsample_conv", "conv")
            yield ModuleMap(f"{block}.downsample.1", f"{flax}/downsample_bn", "batch_norm")


def lightly(net: ResNet) -> Iterator[ModuleMap]:
    """Yields the modules of Lightly's ResNets.

    They are torchvision's children as one sequence, which counts the activation and the pool.
    """
    index = {"conv1": "0", "bn1": "1", **{f"layer{n}": str(n + 3) for n in range(1, 5)}}
    for module in torchvision(net):
        first, dot, rest = module.torch.partition(".")
        yield module._replace(torch=f"{index[first]}{dot}{rest}")


def sslight(net: ResNet) -> Iterator[ModuleMap]:
    """Yields the modules of SSLight's ResNets: Lightly's under `encoder`."""
    for module in lightly(net):
        yield module._replace(torch=f"encoder.{module.torch}")


def tensorflow(net: ResNet) -> Iterator[ModuleMap]:
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
    for _, _, flax, convs, shortcut in _blocks(net):
        if shortcut:
            yield from pair(f"{flax}/downsample_conv", f"{flax}/downsample_bn")
        for n in range(1, convs + 1):
            yield from pair(f"{flax}/conv{n}", f"{flax}/bn{n}")


def detectron2(net: ResNet) -> Iterator[ModuleMap]:
    """Yields the modules of Detectron2's ResNets, where norms belong to their convolutions."""
    yield ModuleMap("stem.conv1", "conv1", "conv")
    yield ModuleMap("stem.conv1.norm", "bn1", "batch_norm")
    for stage, i, flax, convs, shortcut in _blocks(net):
        block = f"res{stage + 2}.{i}"
        for n in range(1, convs + 1):
            yield ModuleMap(f"{block}.conv{n}", f"{flax}/conv{n}", "conv")
            yield ModuleMap(f"{block}.conv{n}.norm", f"{flax}/bn{n}", "batch_norm")
        if shortcut:
            yield ModuleMap(f"{block}.shortcut", f"{flax}/downsample_conv", "conv")
            yield ModuleMap(f"{block}.shortcut.norm", f"{flax}/downsample_bn", "batch_norm")


def _blocks(net: ResNet) -> Iterator[tuple[int, int, str, int, bool]]:
    """Yields (stage, index in it, Flax name, convolutions, has a shortcut) per block."""
    convs = 3 if net.block == "bottleneck" else 2
    for stage, size in enumerate(net.stage_sizes):
        for i in range(size):
            shortcut = i == 0 and (stage > 0 or convs == 3)
            yield stage, i, f"layer{stage + 1}_{i}", convs, shortcut


def _spec(state: State, stem: str, stage: str, first_stage: int) -> dict[str, Any] | None:
    """Returns backbone, width and stem of a state dict, or None.

    Args:
      state: of the backbone.
      stem: the key of the first convolution's weight.
      stage: the start of the names of stages, before their numbers.
      first_stage: the number of the first stage.
    """
    counts = (count_children(state, f"{stage}{first_stage + i}") for i in range(4))
    sizes = tuple(count for count in counts if count)
    block = "bottleneck" if f"{stage}{first_stage}.0.conv3.weight" in state else "basic"
    kernel = state[stem]
    spec = _with_width(sizes, block, len(kernel))
    if spec is None:
        return None
    default = models.BACKBONES[spec["backbone"]][1]["stem"]
    kind = "small" if kernel.shape[-1] == 3 else "imagenet"
    return {**spec, "stem": "" if kind == default else kind}


def _tensorflow_spec(state: State) -> dict[str, Any] | None:
    if sum(key.startswith("conv2d") for key in state) != _TENSORFLOW_CONVOLUTIONS:
        return None
    return _with_width((3, 4, 6, 3), "bottleneck", len(state["conv2d.weight"]))


def _with_width(sizes: tuple[int, ...], block: str, width: int) -> dict[str, Any] | None:
    """Returns the variant with these blocks and `width` channels in its first stage, or None.

    If no variant has this width, the first one with these blocks is returned with the width.
    """
    shapes = {"stage_sizes": sizes, "block": block}
    if exact := variants(ResNet, **shapes, width=width):
        return {"backbone": exact[0]}
    names = variants(ResNet, **shapes)
    return {"backbone": names[0], "width": width} if names else None


# timm and torchvision have the ImageNet sizes; the wide and the narrow ones exist only here.
_MODELS = {f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)}
_MODELS |= dict.fromkeys((f"resnet50w{width}" for width in (2, 4, 5)), "")
_MODELS |= dict.fromkeys((f"resnet{depth}" for depth in (8, 14, 20)), "")
_EXPORTS = {name: Export(torchvision, model, "fc") for name, model in _MODELS.items()}

FAMILY = Family(
    layouts=(
        Layout(
            "torchvision_resnet",
            ("conv1.weight", "layer1.0.conv1.weight"),
            torchvision,
            functools.partial(_spec, stem="conv1.weight", stage="layer", first_stage=1),
        ),
        Layout(
            "sequential_resnet",
            ("encoder.0.weight", "encoder.4.0.conv1.weight"),
            sslight,
            functools.partial(_spec, stem="encoder.0.weight", stage="encoder.", first_stage=4),
            only="sslight",
        ),
        Layout(
            "lightly_resnet",
            ("0.weight", "4.0.conv1.weight"),
            lightly,
            functools.partial(_spec, stem="0.weight", stage="", first_stage=4),
            only="lightly",
        ),
        Layout(
            "tensorflow_resnet",
            ("conv2d.weight", "conv2d_1.weight"),
            tensorflow,
            _tensorflow_spec,
            only="simclr",
        ),
        Layout(
            "detectron2_resnet",
            ("stem.conv1.weight", "res2.0.conv1.norm.weight"),
            detectron2,
            functools.partial(_spec, stem="stem.conv1.weight", stage="res", first_stage=2),
        ),
    ),
    exports={
        "timm": _EXPORTS,
        "torchvision": _EXPORTS,
        "detectron2": {name: Export(detectron2, classifier="fc") for name in _MODELS},
        "moco": {name: Export(torchvision, classifier="fc") for name in VARIANTS},
    },
    aliases={
        "rn50w2": "resnet50w2",
        "rn50w4": "resnet50w4",
        "rn50w5": "resnet50w5",
        "resnet50x2": "resnet50w2",
        "resnet50x4": "resnet50w4",
    },
    variant_of={"resnet50_same": "resnet50"},
    by_code_base={("byol", "resnet50"): "resnet50_same"},  # pads as TensorFlow does
)
