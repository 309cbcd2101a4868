"""Reading and verifying a single checkpoint on the disk.

A checkpoint is a folder STEP of Orbax: a folder of arrays for every part of the state, and
meta/metadata with the step, the data position, checksums of all parts and a checksum of itself.

Each process reads on its own, without communication, so an error here comes from the storage or
the file and never from another process. A checkpoint counts as damaged only with proof: a checksum
that does not match, a missing file, or contents that cannot be decoded. A disk that does not
respond and a lack of memory or of file handles prove nothing; their exceptions are passed on.
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
OLD_METRICS = "metrics/metrics"  # the value for keep-best in checkpoints without "metric"
_SELF = "checksum"
# Errors of the machine, which TensorStore and Orbax distinguish only by their messages. Their
# other errors concern the file.
_SHORTAGE = re.compile(
    r"RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|"
    r"Too many open files|Cannot allocate|bad_alloc|[Oo]ut of memory|Permission denied|"
    r"Input/output error|Stale file handle|Resource temporarily unavailable|can't start new thread|"
    r"os_error_code='(5|11|12|13|23|24|116)'"
)


class Damaged(Exception):
    """Raised if a checkpoint differs from what was saved; the message gives the reason."""


def describe(
    step: int, position: Sequence[Sequence[int]], parts: Mapping[str, Any], metric: float | None
) -> dict[str, Any]:
    """Returns the metadata of a checkpoint.

    Args:
      step: the step of the state.
      position: (epoch, offset) of each host's data.
      parts: name -> tree of host arrays.
      metric: the value for keep-best; None: unknown.
    """
    meta = {
        "step": step,
        "position": [list(map(int, place)) for place in position],
        "checksums": {name: checksum(tree) for name, tree in parts.items()},
        "shapes": {name: shapes(tree) for name, tree in parts.items()},
        "metric": metric,
    }
    return {**meta, _SELF: _meta_checksum(meta)}


def read(
    folder: epath.Path, step: int, parts: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads and verifies parts of a checkpoint.

    Args:
      folder: the folder of all checkpoints.
      step: the step of this checkpoint.
      parts: name -> tree of arrays of the same shapes and dtypes.

    Returns:
      {name: tree of host arrays}, and the metadata {"step", "position", ...}.

    Raises:
      Damaged: two attempts in a row prove that it is damaged.
      UserError: it contains a state of other shapes.
      OSError, MemoryError, RuntimeError: the machine or the storage cannot read it.
    """
    try:
        return _read_once(folder / str(step), step, parts)
    except Damaged:  # another process may just have been moving the file
        return _read_once(folder / str(step), step, parts)


def read_meta(place: epath.Path, step: int) -> dict[str, Any]:
    """Reads the metadata of the checkpoint in the folder `place`.

    Raises:
      Damaged: the metadata is missing, damaged or of another step.
      OSError: the metadata cannot be read.
    """
    try:
        meta = files.read_json(place / META / "metadata")
    except FileNotFoundError as error:
        raise Damaged("its metadata is missing") from error
    except NotADirectoryError as error:
        raise Damaged("it is not a folder") from error
    except UserError as error:
        raise Damaged(str(error)) from error
    meta = dict(meta)
    stored_checksum = meta.pop(_SELF, None)
    # Earlier versions wrote neither a checksum of the metadata nor "metric".
    is_old = stored_checksum is None and "metric" not in meta
    if stored_checksum != _meta_checksum(meta) and not is_old:
        raise Damaged("the checksum of its metadata does not match")
    if not _is_valid(meta) or meta["step"] != step:
        raise Damaged("its metadata does not describe a checkpoint of this step")
    return meta


def metric_of(place: epath.Path, step: int, name: str) -> float | None:
    """Returns the value for keep-best, or None if it is unknown."""
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
    """Computes the CRC-32 over the path, shape and dtype of every leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    described = [(jax.tree_util.keystr(path), np.shape(x), str(x.dtype)) for path, x in leaves]
    return zlib.crc32(repr(described).encode())


def checksum(tree: Any) -> int:
    """Computes the CRC-32 over the bytes of every leaf, in the order of the tree."""
    value = 0
    for leaf in jax.tree.leaves(tree):
        # Viewed as bytes, because Python's buffer protocol does not support bfloat16.
        value = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, value)
    return value


def _meta_checksum(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _is_valid(meta: Mapping[str, Any]) -> bool:
    """Returns whether the fields that a resumed run reads have the right types."""
    positions, sums = meta.get("position"), meta.get("checksums")
    return (
        _is_count(meta.get("step"))
        and isinstance(sums, dict)
        and all(map(_is_count, sums.values()))
        and isinstance(positions, list)
        and bool(positions)
        and all(isinstance(p, list) and len(p) == 2 and all(map(_is_count, p)) for p in positions)
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _read_once(
    place: epath.Path, step: int, parts: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    meta = read_meta(place, step)
    stored_shapes = meta.get("shapes", {})
    changed = [
        name for name in parts if stored_shapes and stored_shapes.get(name) != shapes(parts[name])
    ]
    if changed:
        raise UserError(
            f"In checkpoint {step}, {' and '.join(changed)} has other shapes than in this run: the "
            "config has changed. Give the old values to resume, or another --workdir."
        )
    restored = {name: _read_part(place / name, tree) for name, tree in parts.items()}
    for name, tree in restored.items():
        if checksum(tree) != meta["checksums"].get(name):
            raise Damaged(f"the checksum of {name!r} does not match")
    return restored, meta


def _read_part(place: epath.Path, like: Any) -> Any:
    """Reads a tree of host arrays, in this process only."""
    process = jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    abstract = jax.tree.map(lambda x: np.zeros(np.shape(x), x.dtype), like)
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=options) as reader:
            return reader.restore(place, args=ocp.args.StandardRestore(abstract))
    except Exception as error:  # three libraries raise here, without a common class
        if _is_proof(error):
            raise Damaged(f"{place.name}: {first_line(error)}") from error
        raise


def _is_proof(error: Exception) -> bool:
    """Returns whether an error proves that the file is damaged, rather than unreadable for now."""
    if isinstance(error, MemoryError) or _SHORTAGE.search(str(error)):
        return False
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return isinstance(error, KeyError | TypeError | ValueError)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
