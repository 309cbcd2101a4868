"""Fills a network's variables from a state dict and accounts for every key of both."""

from collections.abc import Sequence

import jax
import ml_dtypes
import numpy as np

import disco_jax.convert.heads as heads
from disco_jax.convert.family import State
from disco_jax.convert.keys import is_allowed, serves_training
from disco_jax.convert.name_table import entries
from disco_jax.convert.names import ParamMap
from disco_jax.convert.network import Recognised
from disco_jax.convert.text import listed, shown
from disco_jax.errors import UserError
from disco_jax.models.encoder import Encoder, Variables

SIDE = 64  # px, of the images used to infer shapes; no weight depends on it
_MAX_LINES = 20
# Arrays stored beside a network that are not part of it.
_EXTRAS = "queue", "queue_ptr", "queue2", "small_queue", "center"

Path = tuple[str, ...]


def fill(
    encoder: Encoder, state: State, network: Recognised, allow: tuple[str, ...], source: str
) -> tuple[Variables, dict[str, str], tuple[str, ...]]:
    """Fills the variables of `encoder` from a state dict.

    Args:
      encoder: the network that `network` describes.
      state: full keys to arrays in PyTorch's layout.
      network: where the network's arrays are in `state`.
      allow: patterns of keys that may be left over, and of variables' paths that may be missing.
      source: the name of the state dict in messages.

    Returns:
      The variables in float32, key -> path of every array used, and the unused keys.

    Raises:
      UserError: keys are missing, left over or of the wrong shape, or weights are not finite.
    """
    like = jax.eval_shape(lambda: encoder.create(0, SIDE))
    paths, structure = jax.tree_util.tree_flatten_with_path(dict(like))
    shapes = {tuple(k.key for k in path): leaf.shape for path, leaf in paths}
    arrays, keys, problems = _convert(encoder, state, network, shapes)
    missing = [path for path in shapes if path not in arrays]
    problems += [f"missing: {'/'.join(p)}" for p in missing if not is_allowed("/".join(p), allow)]
    unused = [k for k in state if k not in keys and not k.endswith("num_batches_tracked")]
    _refuse(problems, _unexplained(unused, network, allow), network, source)
    check_numbers({key: state[key] for key in keys}, source)
    if missing:
        arrays |= _initial_values(encoder, missing)
    leaves = [np.ascontiguousarray(arrays[path], np.float32) for path in shapes]
    return jax.tree.unflatten(structure, leaves), keys, tuple(unused)


def check_numbers(arrays: State, source: str) -> None:
    """Refuses weights that are not floating-point numbers or not finite in float32.

    Raises:
      UserError: with the keys of such arrays.
    """
    others = [key for key, array in arrays.items() if not _is_floating(array)]
    if others:
        dtypes = listed(sorted({str(arrays[key].dtype) for key in others}))
        raise UserError(
            f"{source} has {dtypes} numbers as weights, in {len(others)} of {len(arrays)} arrays "
            f"({listed(others)}): save them as float32, float16 or bfloat16."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        bad = [k for k, v in arrays.items() if not np.isfinite(np.asarray(v, np.float32)).all()]
    if bad:
        raise UserError(
            f"{source} has NaN or infinite weights, in {len(bad)} of {len(arrays)} arrays "
            f"({listed(bad)}): the training that wrote it has diverged; take an earlier checkpoint."
        )


def _is_floating(array: np.ndarray) -> bool:
    return np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16


def _convert(
    encoder: Encoder, state: State, network: Recognised, shapes: dict[Path, tuple[int, ...]]
) -> tuple[dict[Path, np.ndarray], dict[str, str], list[str]]:
    """Converts the arrays of a state dict to Flax's layout.

    Returns:
      Path in the variables -> array, key -> path, and one line per array of the wrong shape.
    """
    values = heads.defaults(state, network.prefix.head or network.prefix.root, network.head)
    arrays, keys, problems = {}, {}, []
    for entry in entries(encoder, network.layout.modules, network.prefix, network.head):
        shape = shapes.get(entry.flax)
        if shape is None:
            continue
        if entry.torch in values:
            arrays[entry.flax] = np.full(shape, values[entry.torch], np.float32)
        elif entry.torch in state:
            stored = state[entry.torch]
            keys[entry.torch] = "/".join(entry.flax)
            arrays[entry.flax] = array = _to_flax(entry.param, stored)
            if array.shape != shape:
                problems.append(
                    f"{shown(entry.torch)}: shape {stored.shape}, which becomes {array.shape} "
                    f"instead of {shape}"
                )
    return arrays, keys, problems


def _to_flax(param: ParamMap, array: np.ndarray) -> np.ndarray:
    """Converts an array to Flax's layout; returns it unchanged if its axes do not fit."""
    try:
        return param.load(array)
    except (ValueError, IndexError):
        return array


def _unexplained(
    unused: Sequence[str], network: Recognised, allow: tuple[str, ...]
) -> dict[str, list[str]]:
    """Groups the keys that nothing explains by the prefix of their module.

    Keys inside the backbone or the head are grouped under "".

    Args:
      unused: keys whose arrays were not used.
      network: the network.
      allow: patterns of keys that may be left over.
    """
    prefix, head = network.prefix, network.head
    classifiers = tuple(f"{prefix.root}{root}." for root in head.classifiers)
    inside: tuple[str, ...] = (prefix.head,) if prefix.head else ()
    if prefix.backbone:
        inside += (prefix.root + prefix.backbone,)
        inside += (f"{prefix.root}{head.root}.",) if head.root else ()
    unexplained: dict[str, list[str]] = {}
    for key in unused:
        module = key.removeprefix(prefix.root).partition(".")[0]
        if not key.startswith((prefix.root, *inside)) or key.startswith(classifiers):
            continue
        if key.rpartition(".")[2] in _EXTRAS or is_allowed(key, allow):
            continue
        if key.startswith(inside):
            unexplained.setdefault("", []).append(key)
        elif not serves_training(module):
            beside = f"{prefix.root}{module}." if prefix.backbone else ""
            unexplained.setdefault(beside, []).append(key)
    return unexplained


def _refuse(
    problems: Sequence[str], unexplained: dict[str, list[str]], network: Recognised, source: str
) -> None:
    """Raises a `UserError` if there are problems or keys that nothing explains."""
    if unexplained and not problems and "" not in unexplained:
        patterns = " ".join(f"--allow '{shown(start)}*'" for start in unexplained)
        raise UserError(
            f"{source} has {listed(start.removesuffix('.') for start in unexplained)} beside the "
            f"backbone, which is not a known head: to leave it out, add {patterns} (an option of "
            "disco-jax import)."
        )
    lines = [*problems, *(f"left over: {shown(k)}" for keys in unexplained.values() for k in keys)]
    if not lines:
        return
    more = f"\n  and {len(lines) - _MAX_LINES} more" if len(lines) > _MAX_LINES else ""
    raise UserError(
        f"{source} does not match the {network.spec['backbone']} with the head "
        f"{network.spec['head']!r} that its keys describe:\n  "
        + "\n  ".join(lines[:_MAX_LINES])
        + more
        + "\nTo allow missing or left-over keys, add --allow PATTERN (an option of "
        "disco-jax import)."
    )


def _initial_values(encoder: Encoder, paths: Sequence[Path]) -> dict[Path, np.ndarray]:
    """Returns the initial values of variables that a checkpoint does not hold."""
    arrays, created = {}, encoder.create(0, SIDE)
    for path in paths:
        leaf = created
        for part in path:
            leaf = leaf[part]
        arrays[path] = np.asarray(leaf)
    return arrays
