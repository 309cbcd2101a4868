"""Modules of inverted residuals, which EfficientNets and MobileNets share."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from disco_jax.convert.names import ModuleMap


class Residual(NamedTuple):
    """One inverted residual.

    Attributes:
      stage: its stage.
      position: its index in the stage.
      flax: its path in the variables.
      expands: whether it starts with an expansion.
      squeezes: whether it has squeeze-and-excitation.
    """

    stage: int
    position: int
    flax: str
    expands: bool
    squeezes: bool


def residuals(net: Any, stem_width: int) -> Iterator[Residual]:
    """Yields the inverted residuals of a network whose stem has `stem_width` channels."""
    width = stem_width
    for stage, blocks in enumerate(net.blocks()):
        for i, block in enumerate(blocks):
            yield Residual(
                stage, i, f"block{stage}_{i}", block.expanded != width, bool(block.squeeze)
            )
            width = block.channels


def conv_bn(torch: str, flax: str) -> Iterator[ModuleMap]:
    """Yields a sequence of a convolution and its BatchNorm."""
    yield ModuleMap(f"{torch}.0", f"{flax}_conv", "conv")
    yield ModuleMap(f"{torch}.1", f"{flax}_bn", "batch_norm")


def timm(net: Any, stem_width: int) -> Iterator[ModuleMap]:
    """Yields stem and blocks under timm's names."""
    yield ModuleMap("conv_stem", "stem_conv", "conv")
    yield ModuleMap("bn1", "stem_bn", "batch_norm")
    for stage, i, flax, expands, squeezes in residuals(net, stem_width):
        block = f"blocks.{stage}.{i}"
        project = "conv_pwl" if expands else "conv_pw"
        parts = [("conv_dw", "depthwise"), (project, "project")]
        if expands:
            parts.insert(0, ("conv_pw", "expand"))
        for n, (conv, part) in enumerate(parts, 1):
            yield ModuleMap(f"{block}.{conv}", f"{flax}/{part}_conv", "conv")
            yield ModuleMap(f"{block}.bn{n}", f"{flax}/{part}_bn", "batch_norm")
        if squeezes:
            yield ModuleMap(f"{block}.se.conv_reduce", f"{flax}/squeeze/reduce", "linear1x1")
            yield ModuleMap(f"{block}.se.conv_expand", f"{flax}/squeeze/expand", "linear1x1")


def torchvision_block(torch: str, residual: Residual) -> Iterator[ModuleMap]:
    """Yields one block under torchvision's names of EfficientNet and MobileNetV3."""
    layer, flax = 0, residual.flax
    if residual.expands:
        yield from conv_bn(f"{torch}.0", f"{flax}/expand")
        layer = 1
    yield from conv_bn(f"{torch}.{layer}", f"{flax}/depthwise")
    if residual.squeezes:
        layer += 1
        yield ModuleMap(f"{torch}.{layer}.fc1", f"{flax}/squeeze/reduce", "linear1x1")
        yield ModuleMap(f"{torch}.{layer}.fc2", f"{flax}/squeeze/expand", "linear1x1")
    yield from conv_bn(f"{torch}.{layer + 1}", f"{flax}/project")
