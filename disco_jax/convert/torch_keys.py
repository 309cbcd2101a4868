"""How PyTorch names the weights of our networks: one table a family."""

import re
from collections.abc import Mapping

import numpy as np

# torchvision's ResNet; `fc` is the MoCo-v2 head that replaces its classifier. {module} of ours.
RESNET = (
    (r"conv1", "backbone/conv1"),
    (r"bn1", "backbone/bn1"),
    (r"layer(\d)\.(\d+)\.(conv\d|bn\d)", r"backbone/layer\1_\2/\3"),
    (r"layer(\d)\.(\d+)\.downsample\.0", r"backbone/layer\1_\2/downsample_conv"),
    (r"layer(\d)\.(\d+)\.downsample\.1", r"backbone/layer\1_\2/downsample_bn"),
    (r"fc\.0", "head/hidden"),
    (r"fc\.2", "head/out"),
    (r"fc", "head/out"),
)
_LEAVES = {
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}


def translate(key: str, value: np.ndarray) -> tuple[str, np.ndarray] | None:
    """One entry of a state dict in our names and layout.

    Args:
      key: without the prefix of the network, e.g. "layer1.0.bn1.weight".
      value: in PyTorch's layout: convolutions OIHW, linear layers [out, in].

    Returns:
      "collection/module/.../leaf" and the array (HWIO, [in, out]); None for a key that no
      network of ours has.
    """
    module, _, leaf = key.rpartition(".")
    for pattern, ours in RESNET:
        if match := re.fullmatch(pattern, module):
            path = match.expand(ours)
            break
    else:
        return None
    if leaf in _LEAVES:
        collection, name = _LEAVES[leaf]
        return f"{collection}/{path}/{name}", value
    if leaf != "weight":
        return None
    if value.ndim == 1:
        return f"params/{path}/scale", value
    axes = (2, 3, 1, 0) if value.ndim == 4 else (1, 0)
    return f"params/{path}/kernel", np.ascontiguousarray(value.transpose(axes))


def strip(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The entries under `prefix`, without it and without BatchNorm's step counters."""
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and not key.endswith("num_batches_tracked")
    }
