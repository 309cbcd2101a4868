"""Finds the weights in the content of a checkpoint file."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from disco_jax import errors
from disco_jax.convert.layouts import networks
from disco_jax.convert.rebuild import Stub
from disco_jax.convert.text import listed, shown
from disco_jax.errors import UserError

# Entries in which training scripts store weights, in search order. DINO's checkpoints hold both
# networks; its authors release the teacher, the moving average of the student.
_CONTAINERS = ("state_dict", "teacher", "model", "student", "net", "state_dict_ema", "model_ema")
_MAX_DEPTH = 4  # levels of nested dicts searched for weights under other names


def find(content: Any, source: str, entry: str = "") -> tuple[dict[str, np.ndarray], str]:
    """Finds the state dict in a file.

    Args:
      content: of the file.
      source: its path, for messages.
      entry: the path of the state dict in `content`, dots between names; "": the entry that
        training scripts usually store it in, or the only entry that holds a network.

    Returns:
      The arrays under their full keys, and the path of the entry that holds them.

    Raises:
      UserError: there is no such entry, no state dict or several of them, or a whole model.
    """
    container, steps = _entry(content, source, entry), list(filter(None, entry.split(".")))
    # Arrays beside the state dict (a best accuracy, for example) must not end the search.
    while name := next((n for n in _CONTAINERS if _holds_dict(container, n)), None):
        container = container[name]
        steps.append(name)
    arrays_here = arrays_of(container)
    if arrays_here and networks(arrays_here):
        return arrays_here, ".".join(steps)
    candidates = dict(_candidates(container))
    with_networks = {path: arrays for path, arrays in candidates.items() if networks(arrays)}
    choices = with_networks or ({} if arrays_here else candidates)
    if len(choices) == 1:
        [(path, arrays)] = choices.items()
        return arrays, ".".join([*steps, path])
    if choices:
        paths = [".".join([*steps, path]) for path in choices]
        raise UserError(
            f"{source} holds several sets of weights, {listed(sorted(paths))}: choose one with "
            "--entry (an option of disco-jax import)."
        )
    if arrays_here:
        return arrays_here, ".".join(steps)
    raise UserError(f"{source} {_without_weights(container)}")


def arrays_of(content: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of a dict that have string keys; {} for other objects."""
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
    """Returns whether `content[name]` is a non-empty dict."""
    return isinstance(content, dict) and isinstance(content.get(name), dict) and content[name] != {}


def _candidates(
    content: Any, depth: int = _MAX_DEPTH
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields (path, arrays) of every nested dict that directly holds an array of 2 or more axes."""
    if not isinstance(content, dict) or not depth:
        return
    for name, inner in content.items():
        if not isinstance(name, str) or not isinstance(inner, dict):
            continue
        arrays = arrays_of(inner)
        if any(array.ndim > 1 for array in arrays.values()):
            yield name, arrays
        else:
            for path, arrays in _candidates(inner, depth - 1):
                yield f"{name}.{path}", arrays


def _without_weights(content: Any) -> str:
    """Describes the content instead of a state dict: the rest of an error message."""
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
    """Returns whether an object is a PyTorch module."""
    if not isinstance(content, Stub) or not isinstance(content.state, dict):
        return False
    return "_parameters" in content.state and "_modules" in content.state
