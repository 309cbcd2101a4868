"""Reads the safetensors format: the length of a header, the header in JSON, the arrays.

This reader needs no PyTorch for bfloat16 and uses no more memory than the size of the file: arrays
must follow one another without gaps or overlaps.
"""

import json
import math
import os
import struct
from typing import Any

import numpy as np

from disco_jax.convert.archive import (
    Refused,
    are_sizes,
    copy_elements,
    file_bytes,
    open_file,
    reported_as_user_errors,
)
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
    """Returns every array of a file under its key.

    Raises:
      UserError: the file does not exist, is damaged, or holds numbers of an unsupported type.
    """
    with reported_as_user_errors(path):
        return _arrays(file_bytes(open_file(path)))


def _arrays(buffer: memoryview) -> dict[str, np.ndarray]:
    if len(buffer) < _LENGTH.size:
        raise Refused("is damaged or not a safetensors file: it has no header.")
    (length,) = _LENGTH.unpack_from(buffer)
    start = _LENGTH.size + length
    if start > len(buffer):
        raise Refused("is damaged or not a safetensors file: it ends inside its header.")
    header = json.loads(bytes(buffer[_LENGTH.size : start]), object_pairs_hook=_unique_keys)
    if type(header) is not dict:
        raise Refused("is damaged or not a safetensors file: its header lists no arrays.")
    entries = [(*_entry(key, value), key) for key, value in header.items() if key != _METADATA]
    arrays, previous_end = {}, 0
    for first, end, dtype, shape, key in sorted(entries, key=lambda entry: entry[:2]):
        if first != previous_end:
            raise Refused(f"is damaged: {shown(key)} does not start where the previous array ends.")
        count = math.prod(shape)
        array = copy_elements(buffer, start + first, count, dtype)
        if array.nbytes != end - first:
            raise Refused(f"is damaged: the size of {shown(key)} does not match its shape.")
        arrays[key], previous_end = array.reshape(shape), end
    if start + previous_end != len(buffer):
        raise Refused("is damaged: it does not end where its last array ends.")
    return {key: arrays[key] for key in header if key != _METADATA}


def _entry(key: str, value: Any) -> tuple[int, int, str, tuple[int, ...]]:
    """Returns first byte, end byte, type and shape of an array, from the header."""
    if type(value) is not dict:
        raise Refused(f"is damaged: its header does not describe {shown(key)}.")
    name, shape, offsets = (value.get(field) for field in ("dtype", "shape", "data_offsets"))
    if name not in _TYPES:
        raise Refused(
            f"holds numbers of the type {shown(name)} ({shown(key)}), which is not supported: "
            "save the weights as float32, float16 or bfloat16."
        )
    if not (type(shape) is list and type(offsets) is list and len(offsets) == 2):
        raise Refused(f"is damaged: {shown(key)} has an invalid shape or offset.")
    if not (are_sizes(shape) and are_sizes(offsets)):
        raise Refused(f"is damaged: {shown(key)} has an invalid shape or offset.")
    return offsets[0], offsets[1], _TYPES[name], tuple(shape)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object as a dict; refuses repeated keys."""
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise Refused("is damaged: its header names an array twice.")
    return unique
