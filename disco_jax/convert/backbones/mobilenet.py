"""MobileNetV2 and MobileNetV3 in the layouts of timm, torchvision, SSLight and SEED."""

from collections.abc import Iterator
from typing import Any

from disco_jax.convert.backbones import inverted
from disco_jax.convert.family import Export, Family, Layout, State
from disco_jax.convert.names import ModuleMap
from disco_jax.models.backbones.mobilenet import MobileNet

_V3_CLASSIFIER = ("classifier.0.",)  # torchvision's and SEED's classifiers start with the tail


def timm(net: MobileNet) -> Iterator[ModuleMap]:
    """Yields the modules of timm's MobileNets, which DisCo uses."""
    yield from inverted.timm(net, net.stem_width)
    if net.tail_linear:
        last = f"blocks.{len(net.blocks())}.0"
        yield ModuleMap(f"{last}.conv", "tail_conv", "conv")
        yield ModuleMap(f"{last}.bn1", "tail_bn", "batch_norm")
        yield ModuleMap("conv_head", "tail_linear", "linear1x1")
    else:
        yield ModuleMap("conv_head", "tail_conv", "conv")
        yield ModuleMap("bn2", "tail_bn", "batch_norm")


def torchvision_v3(net: MobileNet) -> Iterator[ModuleMap]:
    """Yields the modules of torchvision's MobileNetV3: features.N.block.LAYER."""
    yield from inverted.conv_bn("features.0", "stem")
    blocks = list(inverted.residuals(net, net.stem_width))
    for n, residual in enumerate(blocks, 1):
        yield from inverted.torchvision_block(f"features.{n}.block", residual)
    yield from inverted.conv_bn(f"features.{len(blocks) + 1}", "tail")
    yield ModuleMap("classifier.0", "tail_linear", "linear")


def torchvision_v2(net: MobileNet, root: str = "features") -> Iterator[ModuleMap]:
    """Yields the modules of torchvision's MobileNetV2, which CompRess and SimReg use too."""
    yield from inverted.conv_bn(f"{root}.0", "stem")
    blocks = list(inverted.residuals(net, net.stem_width))
    for n, (_, _, flax, expands, _) in enumerate(blocks, 1):
        block, layer = f"{root}.{n}.conv", 0
        if expands:
            yield from inverted.conv_bn(f"{block}.0", f"{flax}/expand")
            layer = 1
        yield from inverted.conv_bn(f"{block}.{layer}", f"{flax}/depthwise")
        yield ModuleMap(f"{block}.{layer + 1}", f"{flax}/project_conv", "conv")
        yield ModuleMap(f"{block}.{layer + 2}", f"{flax}/project_bn", "batch_norm")
    yield from inverted.conv_bn(f"{root}.{len(blocks) + 1}", "tail")


def sslight_v2(net: MobileNet) -> Iterator[ModuleMap]:
    """Yields the modules of SSLight's MobileNetV2: torchvision's under `encoder`."""
    return torchvision_v2(net, "encoder")


def seed_v3(net: MobileNet) -> Iterator[ModuleMap]:
    """Yields the modules of SEED's MobileNetV3."""
    yield from inverted.conv_bn("features.0", "stem")
    for n, residual in enumerate(inverted.residuals(net, net.stem_width), 1):
        _, _, flax, expands, squeezes = residual
        block = f"features.{n}.conv"
        parts = {"expand": 0, "depthwise": 3, "project": 7} if expands else None
        for part, layer in (parts or {"depthwise": 0, "project": 4}).items():
            yield ModuleMap(f"{block}.{layer}", f"{flax}/{part}_conv", "conv")
            yield ModuleMap(f"{block}.{layer + 1}", f"{flax}/{part}_bn", "batch_norm")
        if squeezes:
            layer = 5 if expands else 3
            yield ModuleMap(f"{block}.{layer}.fc.0", f"{flax}/squeeze/reduce", "linear")
            yield ModuleMap(f"{block}.{layer}.fc.2", f"{flax}/squeeze/expand", "linear")
    yield from inverted.conv_bn("conv", "tail")
    yield ModuleMap("classifier.0", "tail_linear", "linear")


def _timm_spec(state: State) -> dict[str, Any] | None:
    """Recognises V3 by its missing last BatchNorm, and V2 by its missing squeeze-and-excitation."""
    if "bn2.weight" not in state:
        return {"backbone": "mobilenetv3_large"}
    if not any(".se." in key for key in state):
        return {"backbone": "mobilenetv2"}
    return None


# Both V3 variants load into both frameworks' models, whose BatchNorms add different epsilons.
_TIMM_V3 = Export(timm, "mobilenetv3_large_100", epsilon=1e-5, read_as="mobilenetv3_large")
_TORCHVISION_V3 = Export(
    torchvision_v3,
    "mobilenet_v3_large",
    "fc",  # the classifier contains a layer of the backbone
    epsilon=1e-3,
    read_as="mobilenetv3_large_tv",
)

FAMILY = Family(
    priority=1,
    layouts=(
        Layout(
            "timm_inverted",
            ("conv_stem.weight",),
            timm,
            _timm_spec,
            default=lambda state: "timm",
        ),
        Layout(
            "sslight_mobilenetv2",
            ("encoder.0.0.weight", "encoder.1.conv.0.0.weight"),
            sslight_v2,
            lambda state: {"backbone": "mobilenetv2"},
            only="sslight",
        ),
        Layout(
            "torchvision_mobilenetv2",
            ("features.0.0.weight", "features.1.conv.0.0.weight"),
            torchvision_v2,
            lambda state: {"backbone": "mobilenetv2"},
        ),
        Layout(
            "seed_mobilenetv3",
            ("features.0.0.weight", "features.1.conv.0.weight"),
            seed_v3,
            lambda state: {"backbone": "mobilenetv3_large_seed"},
            own=_V3_CLASSIFIER,
            only="seed",
        ),
        Layout(
            "torchvision_mobilenetv3",
            ("features.0.0.weight", "features.1.block.0.0.weight"),
            torchvision_v3,
            lambda state: {"backbone": "mobilenetv3_large_tv"},
            own=_V3_CLASSIFIER,
        ),
    ),
    exports={
        "timm": {
            "mobilenetv2": Export(timm, "mobilenetv2_100"),
            "mobilenetv3_large": _TIMM_V3,
            "mobilenetv3_large_tv": _TIMM_V3._replace(classifier="fc"),
        },
        "torchvision": {
            "mobilenetv2": Export(torchvision_v2, "mobilenet_v2"),
            "mobilenetv3_large": _TORCHVISION_V3,
            "mobilenetv3_large_tv": _TORCHVISION_V3,
        },
        "moco": {
            "mobilenetv2": Export(torchvision_v2),
            "mobilenetv3_large": Export(timm),
            "mobilenetv3_large_seed": Export(seed_v3, classifier="fc"),
            "mobilenetv3_large_tv": Export(torchvision_v3, classifier="fc"),
        },
    },
    aliases={
        "mobilenet_v2": "mobilenetv2",
        "mobilenetv2_100": "mobilenetv2",
        "mobilenet_v3_large": "mobilenetv3_large",
        "mobilenetv3_large_100": "mobilenetv3_large",
    },
    variant_of={
        "mobilenetv3_large_seed": "mobilenetv3_large",
        "mobilenetv3_large_tv": "mobilenetv3_large",
    },
)
