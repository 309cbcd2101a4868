"""MoCo checkpoints of torchvision ResNets: read, recognised, and loaded whole.

`.safetensors` needs the safetensors package and `.pth`, `.pth.tar`, `.pt` need PyTorch, both of
the extra `torch`. PyTorch reads with `weights_only=True`, which refuses whatever is not a tensor
or a plain container.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from disco_jax.convert.torch_keys import strip, translate
from disco_jax.errors import UserError
from disco_jax.ops.memory import Queue

# Where the network stands in a file: MoCo and DisCo checkpoints, then bare state dicts.
PREFIXES = ("module.encoder_q.", "encoder_q.", "module.", "")
# Blocks a stage, and whether there is a third convolution in a block.
_RESNETS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
}


class Described(NamedTuple):
    """The network that a state dict holds: fields of a config's `teacher`."""

    backbone: str
    hidden: int
    dim: int


def read(path: str) -> dict[str, np.ndarray]:
    """Every array of a checkpoint file, under its full key.

    Raises:
      UserError: no such file, a format that is not known, a package that is missing, or a file
        that is damaged or holds more than arrays and plain containers.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pth", ".pt", ".tar"):
        return _read_torch(path)
    raise UserError(f"{path} is neither .safetensors nor .pth, .pth.tar or .pt.")


def describe(state: Mapping[str, np.ndarray], source: str) -> Described:
    """Recognises the network from the keys and shapes of a state dict.

    Raises:
      UserError: when it is not a ResNet of ours with a MoCo head.
    """
    state = _network(state)
    sizes = tuple(
        len({m.group(1) for key in state if (m := re.match(rf"layer{stage}\.(\d+)\.", key))})
        for stage in range(1, 5)
    )
    backbone = _RESNETS.get((sizes, "layer1.0.conv3.weight" in state))
    out = state.get("fc.2.weight", state.get("fc.weight"))
    if backbone is None or out is None:
        raise UserError(
            f"{source} does not hold a ResNet with a MoCo projection head (layers {sizes}, "
            f"{len(state)} arrays). Supported: {', '.join(sorted(set(_RESNETS.values())))}."
        )
    hidden = len(state["fc.0.weight"]) if "fc.0.weight" in state else 0
    return Described(backbone, hidden, len(out))


def from_state_dict(state: Mapping[str, np.ndarray], like: Any, source: str) -> Any:
    """Variables of an encoder from a PyTorch state dict, every key accounted for.

    Args:
      state: full keys to arrays in PyTorch's layout.
      like: {"params", "batch_stats"} of the encoder, for names and shapes.
      source: what to call the state dict in messages.

    Raises:
      UserError: lists keys that are missing, left over or of another shape.
    """
    translated, unknown = {}, []
    for key, value in _network(state).items():
        entry = translate(key, value)
        if entry is None:
            unknown.append(key)
        else:
            translated[entry[0]] = entry[1]
    leaves, structure = jax.tree_util.tree_flatten_with_path(dict(like))
    wanted = {"/".join(k.key for k in path): leaf.shape for path, leaf in leaves}
    problems = [f"missing: {key}" for key in wanted if key not in translated]
    problems += [f"left over: {key}" for key in (*unknown, *(translated.keys() - wanted.keys()))]
    problems += [
        f"{key}: shape {translated[key].shape} instead of {shape}"
        for key, shape in wanted.items()
        if key in translated and translated[key].shape != shape
    ]
    if problems:
        raise UserError(
            f"{source} does not fit the network that config.teacher describes:\n  "
            + "\n  ".join(problems[:20])
            + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        )
    return jax.tree.unflatten(structure, [translated[key].astype(np.float32) for key in wanted])


def load(path: str, like: Any) -> tuple[Any, Queue | None]:
    """The variables of a MoCo-style encoder, and MoCo's queue where the file has one.

    Raises:
      UserError: see `read` and `from_state_dict`.
    """
    state = read(path)
    variables = from_state_dict(state, like, str(path))
    vectors = state.get("module.queue", state.get("queue"))
    if vectors is None:
        return variables, None
    pointer = state.get("module.queue_ptr", state.get("queue_ptr", np.zeros(1)))
    return variables, Queue(
        np.ascontiguousarray(vectors.T, np.float32), np.int32(np.ravel(pointer)[0])
    )


def _network(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The entries of the network to load, without their prefix."""
    for prefix in PREFIXES:
        if prefix + "conv1.weight" in state:
            return strip(state, prefix)
    return dict(state)


def _read_safetensors(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load
    except ImportError:
        raise UserError(f'{path} needs the extra: pip install "disco-jax[torch]".') from None
    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from error


def _read_torch(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UserError(f'{path} needs the extra: pip install "disco-jax[torch]".') from None
    try:
        with path.open("rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged and for refused files
        raise UserError(
            f"{path} is damaged or holds more than weights, and was not loaded: "
            f"{str(error).splitlines()[0]}"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no state dict.")
    return {key: value.float().numpy() for key, value in tensors.items()}
