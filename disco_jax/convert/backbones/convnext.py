"""ConvNeXts in timm's layout."""

from collections.abc import Iterator
from typing import Any

from disco_jax.convert.backbones.variants import variants
from disco_jax.convert.family import Export, Family, Layout, State, count_children
from disco_jax.convert.names import ModuleMap
from disco_jax.models.backbones.convnext import VARIANTS, ConvNeXt


def timm(net: ConvNeXt) -> Iterator[ModuleMap]:
    """Yields the modules of timm's ConvNeXts, whose MLPs are 1x1 convolutions."""
    yield ModuleMap("stem.0", "stem_conv", "conv")
    yield ModuleMap("stem.1", "stem_norm", "layer_norm")
    for stage, depth in enumerate(net.depths):
        if stage:
            yield ModuleMap(f"stages.{stage}.downsample.0", f"downsample{stage}_norm", "layer_norm")
            yield ModuleMap(f"stages.{stage}.downsample.1", f"downsample{stage}_conv", "conv")
        for i in range(depth):
            torch, flax = f"stages.{stage}.blocks.{i}", f"block{stage}_{i}"
            yield ModuleMap(f"{torch}.gamma", f"{flax}/gamma", "array")
            yield ModuleMap(f"{torch}.conv_dw", f"{flax}/depthwise_conv", "conv")
            yield ModuleMap(f"{torch}.norm", f"{flax}/norm", "layer_norm")
            yield ModuleMap(f"{torch}.mlp.fc1", f"{flax}/mlp/fc1", "linear1x1")
            yield ModuleMap(f"{torch}.mlp.fc2", f"{flax}/mlp/fc2", "linear1x1")
    yield ModuleMap("head.norm", "norm", "layer_norm")


def _spec(state: State) -> dict[str, Any] | None:
    depths = tuple(count_children(state, f"stages.{stage}.blocks") for stage in range(4))
    names = variants(ConvNeXt, width=len(state["stem.0.weight"]), depths=depths)
    return {"backbone": names[0]} if names else None


FAMILY = Family(
    layouts=(
        Layout(
            "timm_convnext",
            ("stem.0.weight", "stages.0.blocks.0.conv_dw.weight"),
            timm,
            _spec,
            own=("head.norm.",),  # the features are what it normalizes
            default=lambda state: "timm",
        ),
    ),
    exports={
        "timm": {name: Export(timm, name, "head.fc") for name in VARIANTS},
        "moco": {name: Export(timm, classifier="head.fc") for name in VARIANTS},
    },
)
