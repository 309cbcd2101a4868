"""EfficientNets in the layouts of timm, torchvision and the port that SEED and BINGO use."""

from collections.abc import Iterator
from typing import Any

from disco_jax.convert.backbones import inverted
from disco_jax.convert.backbones.variants import variants
from disco_jax.convert.family import Export, Family, Layout, State, count_children
from disco_jax.convert.names import ModuleMap
from disco_jax.models.backbones.efficientnet import STEM, EfficientNet

_STAGES = 7
_BLOCKS_OF_PORT = {16: "efficientnet_b0_seed", 23: "efficientnet_b1_seed"}


def timm(net: EfficientNet) -> Iterator[ModuleMap]:
    """Yields the modules of timm's EfficientNets, which DisCo uses."""
    yield from inverted.timm(net, STEM)
    yield ModuleMap("conv_head", "head_conv", "conv")
    yield ModuleMap("bn2", "head_bn", "batch_norm")


def lukemelas(net: EfficientNet) -> Iterator[ModuleMap]:
    """Yields the modules of the TensorFlow port that SEED and BINGO use."""
    yield ModuleMap("_conv_stem", "stem_conv", "conv")
    yield ModuleMap("_bn0", "stem_bn", "batch_norm")
    for n, (_, _, flax, expands, _) in enumerate(inverted.residuals(net, STEM)):
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


def torchvision(net: EfficientNet) -> Iterator[ModuleMap]:
    """Yields the modules of torchvision's EfficientNets: features.STAGE.POSITION.block.LAYER."""
    yield from inverted.conv_bn("features.0", "stem")
    for residual in inverted.residuals(net, STEM):
        block = f"features.{residual.stage + 1}.{residual.position}.block"
        yield from inverted.torchvision_block(block, residual)
    yield from inverted.conv_bn(f"features.{len(net.blocks()) + 1}", "head")


def _timm_spec(state: State) -> dict[str, Any] | None:
    return _with_repeats(count_children(state, f"blocks.{stage}") for stage in range(_STAGES))


def _torchvision_spec(state: State) -> dict[str, Any] | None:
    return _with_repeats(count_children(state, f"features.{1 + stage}") for stage in range(_STAGES))


def _with_repeats(counts: Iterator[int]) -> dict[str, Any] | None:
    names = variants(EfficientNet, repeats=tuple(counts))
    return {"backbone": names[0]} if names else None


def _port_spec(state: State) -> dict[str, Any] | None:
    name = _BLOCKS_OF_PORT.get(count_children(state, "_blocks"))
    return {"backbone": name} if name else None


def _exports_to_timm(name: str) -> dict[str, Export]:
    """Returns the exports of all variants of `name`.

    SEED's static padding equals the padding of timm's `tf_` models for images of the nominal size.
    """
    tf = f"tf_{name}"
    return {
        name: Export(timm, name),
        f"{name}_seed": Export(timm, tf, "fc", read_as=tf),
        tf: Export(timm, tf, read_as=tf),
    }


FAMILY = Family(
    priority=2,
    layouts=(
        Layout(
            "timm_inverted",
            ("conv_stem.weight",),
            timm,
            _timm_spec,
            default=lambda state: "timm",
        ),
        Layout(
            "lukemelas_efficientnet",
            ("_conv_stem.weight",),
            lukemelas,
            _port_spec,
            encoder_q=("seed", "bingo"),  # BINGO's second encoder is its teacher
        ),
        Layout(
            "torchvision_efficientnet",
            ("features.0.0.weight", "features.1.0.block.0.0.weight"),
            torchvision,
            _torchvision_spec,
        ),
    ),
    exports={
        "timm": {**_exports_to_timm("efficientnet_b0"), **_exports_to_timm("efficientnet_b1")},
        "torchvision": {
            name: Export(torchvision, name) for name in ("efficientnet_b0", "efficientnet_b1")
        },
        "moco": {
            "efficientnet_b0": Export(timm),
            "efficientnet_b1": Export(timm),
            "efficientnet_b0_seed": Export(lukemelas, classifier="fc"),
            "efficientnet_b1_seed": Export(lukemelas, classifier="fc"),
            "tf_efficientnet_b0": Export(timm),
            "tf_efficientnet_b1": Export(timm),
        },
    },
    variant_of={
        "efficientnet_b0_seed": "efficientnet_b0",
        "efficientnet_b1_seed": "efficientnet_b1",
        "tf_efficientnet_b0": "efficientnet_b0",
        "tf_efficientnet_b1": "efficientnet_b1",
    },
)
