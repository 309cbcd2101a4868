"""Files in the format safetensors: the length of a header, the header in JSON, the arrays.

Read by our own code, so that bfloat16 needs no PyTorch, and the memory taken stays below the size
of the file: arrays must follow one another without holes or overlaps.
"""

import json
import math
import os
import struct
from typing import Any

import numpy as np

from disco_jax.convert.archive import Refused, opened, proper, take, told_of, view
from disco_jax.convert.text import shown

_LENGTH = struct.Struct("<Q")
_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_METADATA = "__metadata__"


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Every array of a file under its key.

    Raises:
      UserError: no such file; one that is damaged, or holds numbers of a type that is not read.
    """
    with told_of(path):
        return _arrays(view(opened(path)))


def _arrays(buffer: memoryview) -> dict[str, np.ndarray]:
    if len(buffer) < _LENGTH.size:
        raise Refused("is damaged or no safetensors file: it has no header.")
    (length,) = _LENGTH.unpack_from(buffer)
    start = _LENGTH.size + length
    if start > len(buffer):
        raise Refused("is damaged or no safetensors file: it ends before its header does.")
    header = json.loads(bytes(buffer[_LENGTH.size : start]), object_pairs_hook=_once)
    if type(header) is not dict:
        raise Refused("is damaged or no safetensors file: its header lists no arrays.")
    listed = [(*_entry(key, value), key) for key, value in header.items() if key != _METADATA]
    arrays, free = {}, 0
    for begin, end, dtype, shape, key in sorted(listed, key=lambda entry: entry[:2]):
        if begin != free:
            raise Refused(f"is damaged: {shown(key)} does not begin where the array before ends.")
        count = math.prod(shape)
        array = take(buffer, start + begin, count, dtype)
        if array.nbytes != end - begin:
            raise Refused(f"is damaged: {shown(key)} has another size than its shape.")
        arrays[key], free = array.reshape(shape), end
    if start + free != len(buffer):
        raise Refused("is damaged: it does not end where its last array does.")
    return {key: arrays[key] for key in header if key != _METADATA}


def _entry(key: str, value: Any) -> tuple[int, int, str, tuple[int, ...]]:
    """First byte, byte behind the last, type and shape of an array, as the header has them."""
    if type(value) is not dict:
        raise Refused(f"is damaged: its header says nothing of {shown(key)}.")
    name, shape, offsets = (value.get(field) for field in ("dtype", "shape", "data_offsets"))
    if name not in _TYPES:
        raise Refused(
            f"holds numbers of the type {shown(name)} ({shown(key)}), which are not read: save "
            "the weights as float32, float16 or bfloat16."
        )
    if not (type(shape) is list and type(offsets) is list and len(offsets) == 2):
        raise Refused(f"is damaged: {shown(key)} has no proper shape or place.")
    if not (proper(shape) and proper(offsets)):
        raise Refused(f"is damaged: {shown(key)} has no proper shape or place.")
    return offsets[0], offsets[1], _TYPES[name], tuple(shape)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each of whose keys is there once."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Refused("is damaged: its header names an array twice.")
    return found
