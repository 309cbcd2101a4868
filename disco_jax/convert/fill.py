"""Arrays of a state dict into the variables of a network, every key of both accounted for."""

from collections.abc import Sequence

import jax
import ml_dtypes
import numpy as np

import disco_jax.convert.heads as heads
from disco_jax.convert.names import Leaf
from disco_jax.convert.recognise import Recognised, State, allowed, of_training
from disco_jax.convert.table import entries
from disco_jax.convert.text import listed, shown
from disco_jax.errors import UserError
from disco_jax.models.encoder import Encoder, Variables

SIDE = 64  # of the images that shapes are worked out with, px; no weight depends on it
_SHOWN = 20
_EXTRAS = "queue", "queue_ptr", "queue2", "small_queue", "center"  # beside a network, no part of it

Path = tuple[str, ...]


def fill(
    encoder: Encoder, state: State, found: Recognised, allow: tuple[str, ...], source: str
) -> tuple[Variables, dict[str, str], tuple[str, ...]]:
    """Variables of `encoder`, key -> path for those taken, and the keys of other networks.

    Args:
      encoder: what `found` describes.
      state: full keys to arrays in PyTorch's layout.
      found: where the arrays are in it.
      allow: patterns of keys that may be left over, and of our paths that may be missing.
      source: what to call the state dict in messages.

    Raises:
      UserError: keys are missing, left over or of another shape, or are no finite numbers.
    """
    like = jax.eval_shape(lambda: encoder.create(0, SIDE))
    leaves, structure = jax.tree_util.tree_flatten_with_path(dict(like))
    wanted = {tuple(k.key for k in path): leaf.shape for path, leaf in leaves}
    taken, keys, problems = _taken(encoder, state, found, wanted)
    fresh = [path for path in wanted if path not in taken]
    problems += [f"missing: {'/'.join(p)}" for p in fresh if not allowed("/".join(p), allow)]
    left = [k for k in state if k not in keys and not k.endswith("num_batches_tracked")]
    _refuse(problems, _unexplained(left, found, allow), found, source)
    check_numbers({key: state[key] for key in keys}, source)
    if fresh:
        taken |= _fresh(encoder, fresh)
    arrays = [np.ascontiguousarray(taken[path], np.float32) for path in wanted]
    return jax.tree.unflatten(structure, arrays), keys, tuple(left)


def check_numbers(arrays: State, source: str) -> None:
    """Refuses weights that are no finite numbers, or that float32 does not hold.

    Raises:
      UserError: with the keys of such arrays.
    """
    others = [key for key, array in arrays.items() if not _is_floating(array)]
    if others:
        kinds = listed(sorted({str(arrays[key].dtype) for key in others}))
        raise UserError(
            f"{source} has {kinds} numbers as weights, in {len(others)} of {len(arrays)} arrays "
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


def _taken(
    encoder: Encoder, state: State, found: Recognised, wanted: dict[Path, tuple[int, ...]]
) -> tuple[dict[Path, np.ndarray], dict[str, str], list[str]]:
    """Our path -> array, key -> our path, and a line for each array of another shape."""
    values = heads.defaults(state, found.place.head or found.place.prefix, found.head)
    taken, keys, problems = {}, {}, []
    for entry in entries(encoder, found.layout, found.place, found.head):
        shape = wanted.get(entry.ours)
        if shape is None:
            continue
        if entry.theirs in values:
            taken[entry.ours] = np.full(shape, values[entry.theirs], np.float32)
        elif entry.theirs in state:
            array = state[entry.theirs]
            keys[entry.theirs] = "/".join(entry.ours)
            taken[entry.ours] = value = _turned(entry.leaf, array)
            if value.shape != shape:
                problems.append(
                    f"{shown(entry.theirs)}: shape {array.shape}, which makes {value.shape} "
                    f"instead of {shape}"
                )
    return taken, keys, problems


def _turned(leaf: Leaf, array: np.ndarray) -> np.ndarray:
    """An array as we have it; as it is, of a shape that will not do, if it lacks the axes."""
    try:
        return leaf.load(array)
    except (ValueError, IndexError):
        return array


def _unexplained(
    left: Sequence[str], found: Recognised, allow: tuple[str, ...]
) -> dict[str, list[str]]:
    """What begins the keys of a module -> those of its keys that nothing explains.

    Those inside the backbone or the head are under "".

    Args:
      left: keys that were not taken.
      found: the network.
      allow: patterns of keys that may be left over.
    """
    place, head = found.place, found.head
    known = tuple(f"{place.prefix}{root}." for root in head.classifiers)
    inside: tuple[str, ...] = (place.head,) if place.head else ()
    if place.backbone:
        inside += (place.prefix + place.backbone,)
        inside += (f"{place.prefix}{head.root}.",) if head.root else ()
    unexplained: dict[str, list[str]] = {}
    for key in left:
        module = key.removeprefix(place.prefix).partition(".")[0]
        if not key.startswith((place.prefix, *inside)) or key.startswith(known):
            continue
        if key.rpartition(".")[2] in _EXTRAS or allowed(key, allow):
            continue
        if key.startswith(inside):
            unexplained.setdefault("", []).append(key)
        elif not of_training(module):
            beside = f"{place.prefix}{module}." if place.backbone else ""
            unexplained.setdefault(beside, []).append(key)
    return unexplained


def _refuse(
    problems: Sequence[str], unexplained: dict[str, list[str]], found: Recognised, source: str
) -> None:
    """Raises a `UserError` if there are problems or keys that nothing explains."""
    if unexplained and not problems and "" not in unexplained:
        patterns = " ".join(f"--allow '{shown(start)}*'" for start in unexplained)
        raise UserError(
            f"{source} has {listed(start.removesuffix('.') for start in unexplained)} beside the "
            f"backbone, which is no head that is known: to leave it out, add {patterns} (to "
            "disco-jax import)."
        )
    lines = [*problems, *(f"left over: {shown(k)}" for keys in unexplained.values() for k in keys)]
    if not lines:
        return
    more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    raise UserError(
        f"{source} does not fit the {found.spec['backbone']} with the head "
        f"{found.spec['head']!r} that its keys speak of:\n  "
        + "\n  ".join(lines[:_SHOWN])
        + more
        + "\nKeys that may be missing or left over can be allowed with --allow PATTERN (of "
        "disco-jax import)."
    )


def _fresh(encoder: Encoder, paths: Sequence[Path]) -> dict[Path, np.ndarray]:
    """Initial values of what a checkpoint does not hold."""
    made, created = {}, encoder.create(0, SIDE)
    for path in paths:
        leaf = created
        for part in path:
            leaf = leaf[part]
        made[path] = np.asarray(leaf)
    return made
