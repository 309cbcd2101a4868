"""Where in the content of a checkpoint file its weights stand."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from disco_jax import errors
from disco_jax.convert.rebuild import Stub
from disco_jax.convert.recognise import networks
from disco_jax.convert.text import listed, shown
from disco_jax.errors import UserError

# Where a training script puts the weights, in the order in which they are looked for; DINO keeps
# a student beside the teacher, its average, which is the network that it releases.
_CONTAINERS = ("state_dict", "teacher", "model", "student", "net", "state_dict_ema", "model_ema")
_DEPTH = 4  # of dicts in one another that are searched for weights under other names


def find(content: Any, source: str, entry: str = "") -> tuple[dict[str, np.ndarray], str]:
    """The arrays of a state dict in a file, under their full keys, and the entry that holds them.

    Args:
      content: of the file.
      source: its path, for messages.
      entry: where the state dict is, dots between names; "": where training scripts usually put
        it, or the only entry that holds a network.

    Raises:
      UserError: no such entry, no state dict, several of them, or a model instead of one.
    """
    inside, steps = _entry(content, source, entry), list(filter(None, entry.split(".")))
    # Best accuracies and the like may be arrays beside the state dict.
    while name := next((n for n in _CONTAINERS if _holds_dict(inside, n)), None):
        inside = inside[name]
        steps.append(name)
    held = arrays_of(inside)
    if held and networks(held):
        return held, ".".join(steps)
    candidates = dict(_candidates(inside))
    known = {path: arrays for path, arrays in candidates.items() if networks(arrays)}
    several = known or ({} if held else candidates)
    if len(several) == 1:
        [(path, arrays)] = several.items()
        return arrays, ".".join([*steps, path])
    if several:
        paths = [".".join([*steps, path]) for path in several]
        raise UserError(
            f"{source} holds several sets of weights, {listed(sorted(paths))}: choose one with "
            "--entry (of disco-jax import)."
        )
    if held:
        return held, ".".join(steps)
    raise UserError(f"{source} {_without_weights(inside)}")


def arrays_of(content: Any) -> dict[str, np.ndarray]:
    """The arrays of a dict that have a text as their key; {} of anything else."""
    if not isinstance(content, dict):
        return {}
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, np.ndarray)}


def _entry(content: Any, source: str, entry: str) -> Any:
    for name in entry.split(".") if entry else ():
        if not isinstance(content, dict) or name not in content:
            held = content if isinstance(content, dict) else ()
            raise errors.unknown(f"An entry of {source}", name, map(shown, held))
        content = content[name]
    return content


def _holds_dict(content: Any, name: str) -> bool:
    """Whether there is a dict with anything in it under a name."""
    return isinstance(content, dict) and isinstance(content.get(name), dict) and content[name] != {}


def _candidates(content: Any, depth: int = _DEPTH) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Path -> arrays of the dicts in a dict that hold a layer's weights themselves."""
    if not isinstance(content, dict) or not depth:
        return
    for name, inner in content.items():
        if not isinstance(name, str) or not isinstance(inner, dict):
            continue
        arrays = arrays_of(inner)
        if any(array.ndim > 1 for array in arrays.values()):
            yield name, arrays
        else:
            for path, found in _candidates(inner, depth - 1):
                yield f"{name}.{path}", found


def _without_weights(content: Any) -> str:
    """Says what is there instead of a state dict: the rest of a sentence."""
    parts = content.values() if isinstance(content, dict) else (content,)
    if model := next((part for part in parts if _is_model(part)), None):
        return (
            f"holds a whole model, an object of the class {shown(model.name)}, instead of its "
            "weights: load it with the code that saved it, and save model.state_dict() instead."
        )
    if isinstance(content, dict):
        return f"holds no state dict; it holds: {listed(content, 20) or 'nothing'}."
    kind = content.name if isinstance(content, Stub) else type(content).__name__
    return f"holds no state dict; it holds: {shown(kind)}."


def _is_model(content: Any) -> bool:
    """Whether an object is a module of PyTorch."""
    if not isinstance(content, Stub) or not isinstance(content.state, dict):
        return False
    return "_parameters" in content.state and "_modules" in content.state
