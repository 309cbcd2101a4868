"""One checkpoint on the disk: what it holds, and whether that is what was saved.

A checkpoint is a folder STEP of Orbax: a folder of arrays for every part of the state, and
meta/metadata with the step, the position in the data, checksums of all parts and one of itself.

Each process reads by itself, without a word to the others, so an error here is one of the storage
or of the file, never one of a peer. What sets a checkpoint aside is proof: a checksum that does
not match, a file that is missing, contents that cannot be decoded. A disk that answers nothing, a
lack of memory or of open files proves nothing, and is raised as what it is.
"""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from disco_jax import files
from disco_jax.errors import UserError

META = "meta"
OLD_METRICS = "metrics/metrics"  # where checkpoints had the value for keep-best before `metric`
_SELF = "checksum"
# Errors of the machine, which TensorStore and Orbax tell in words alone. All else of theirs is of
# the file.
_SHORTAGE = re.compile(
    r"RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|"
    r"Too many open files|Cannot allocate|bad_alloc|[Oo]ut of memory|Permission denied|"
    r"Input/output error|Stale file handle|Resource temporarily unavailable|can't start new thread|"
    r"os_error_code='(5|11|12|13|23|24|116)'"
)


class Damaged(Exception):
    """A checkpoint is not what was saved; the message says in which way."""


def describe(
    step: int, position: Sequence[Sequence[int]], parts: Mapping[str, Any], metric: float | None
) -> dict[str, Any]:
    """Returns the metadata of a checkpoint.

    Args:
      step: of the state.
      position: (epoch, offset) of each host's data.
      parts: name -> tree of host arrays.
      metric: that decides about keep-best; None: nothing does.
    """
    meta = {
        "step": step,
        "position": [list(map(int, place)) for place in position],
        "checksums": {name: checksum(tree) for name, tree in parts.items()},
        "shapes": {name: shapes(tree) for name, tree in parts.items()},
        "metric": metric,
    }
    return {**meta, _SELF: _of_itself(meta)}


def read(
    folder: epath.Path, step: int, parts: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns parts of a checkpoint, verified, and its metadata.

    Args:
      folder: of all checkpoints.
      step: of this one.
      parts: name -> tree of arrays of the same shapes and dtypes.

    Returns:
      name -> tree of host arrays, and {"step", "position", ...}.

    Raises:
      Damaged: it is proven to be, twice.
      UserError: it is of a state of other shapes.
      OSError, MemoryError, RuntimeError: the machine or the storage does not let it be read.
    """
    try:
        return _read_once(folder / str(step), step, parts)
    except Damaged:  # by a file that was only just being moved, or by the file
        return _read_once(folder / str(step), step, parts)


def read_meta(place: epath.Path, step: int) -> dict[str, Any]:
    """Returns the metadata of the checkpoint in the folder `place`.

    Raises:
      Damaged: it is not there, not whole, or of another step.
      OSError: it cannot be read.
    """
    try:
        meta = files.read_json(place / META / "metadata")
    except FileNotFoundError as error:
        raise Damaged("its metadata is missing") from error
    except NotADirectoryError as error:
        raise Damaged("it is no folder") from error
    except UserError as error:
        raise Damaged(str(error)) from error
    meta = dict(meta)
    noted = meta.pop(_SELF, None)
    # Earlier versions wrote no checksum of the metadata, and no "metric".
    if noted != _of_itself(meta) and not (noted is None and "metric" not in meta):
        raise Damaged("the checksum of its metadata does not match")
    if not _is_sound(meta) or meta["step"] != step:
        raise Damaged("its metadata is not that of a checkpoint of this step")
    return meta


def metric_of(place: epath.Path, step: int, name: str) -> float | None:
    """Returns the value that decides about keep-best; None where it is not known."""
    try:
        meta = read_meta(place, step)
        value = meta["metric"] if "metric" in meta else _old_metric(place, name)
    except (Damaged, OSError):
        return None
    return float(value) if isinstance(value, int | float) else None


def _old_metric(place: epath.Path, name: str) -> Any:
    file = place / OLD_METRICS
    try:
        return files.read_json(file).get(name) if file.exists() else None
    except UserError:
        return None


def shapes(tree: Any) -> int:
    """Returns the CRC-32 over the place, shape and dtype of every leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    told = [(jax.tree_util.keystr(path), np.shape(x), str(x.dtype)) for path, x in leaves]
    return zlib.crc32(repr(told).encode())


def checksum(tree: Any) -> int:
    """Returns the CRC-32 over the bytes of every leaf, in the order of the tree."""
    value = 0
    for leaf in jax.tree.leaves(tree):
        # As bytes: Python's buffers know no bfloat16.
        value = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, value)
    return value


def _of_itself(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _is_sound(meta: Mapping[str, Any]) -> bool:
    """Whether the fields that a run goes on from are of the right kind."""
    places, sums = meta.get("position"), meta.get("checksums")
    return (
        _is_count(meta.get("step"))
        and isinstance(sums, dict)
        and all(map(_is_count, sums.values()))
        and isinstance(places, list)
        and bool(places)
        and all(isinstance(p, list) and len(p) == 2 and all(map(_is_count, p)) for p in places)
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _read_once(
    place: epath.Path, step: int, parts: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    meta = read_meta(place, step)
    known = meta.get("shapes", {})
    other = [name for name in parts if known and known.get(name) != shapes(parts[name])]
    if other:
        raise UserError(
            f"Checkpoint {step} is of a run whose {' and '.join(other)} has other shapes: the "
            "config has changed. Give the old values to go on, or another --workdir."
        )
    restored = {name: _read_part(place / name, tree) for name, tree in parts.items()}
    for name, tree in restored.items():
        if checksum(tree) != meta["checksums"].get(name):
            raise Damaged(f"the checksum of {name!r} does not match")
    return restored, meta


def _read_part(place: epath.Path, like: Any) -> Any:
    """Returns a tree of host arrays, read by this process alone."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    abstract = jax.tree.map(lambda x: np.zeros(np.shape(x), x.dtype), like)
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            return reader.restore(place, args=ocp.args.StandardRestore(abstract))
    except Exception as error:  # of three libraries, which agree on no class
        if _is_proof(error):
            raise Damaged(f"{place.name}: {first_line(error)}") from error
        raise


def _is_proof(error: Exception) -> bool:
    """Whether an error says that the file is wrong, rather than that it could not be read."""
    if isinstance(error, MemoryError) or _SHORTAGE.search(str(error)):
        return False
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return isinstance(error, KeyError | TypeError | ValueError)


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says, or the name of its class."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
