"""Reads and writes PyTorch checkpoints and pickles of arrays without PyTorch.

Nothing in a file is executed: see `disco_jax.convert.machine`.
"""

import io
import itertools
import os
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from disco_jax.convert.archive import (
    DTYPES,
    LOCAL_HEADER,
    STORAGES,
    Archive,
    Refused,
    StorageId,
    contiguous_strides,
    file_bytes,
    open_file,
    read_storages,
    reported_as_user_errors,
    tensor,
)
from disco_jax.convert.machine import Machine
from disco_jax.convert.rebuild import DEFERRED, Stub
from disco_jax.errors import UserError

__all__ = ["Stub", "read", "write"]

# The first two numbers of a file written by PyTorch before 1.6.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_MAX_DEPTH = 100  # of nested containers
# Element type -> storage class, for every type that `write` supports.
_WRITTEN = {
    DTYPES[STORAGES[f"{name}Storage"]]: f"{name}Storage"
    for name in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Byte", "Bool")
}
_ALIGNMENT = 64  # bytes, of the members of an archive, the value of torch.save


def read(path: str | os.PathLike) -> Any:
    """Reads a file written by torch.save, or a pickled dict; executes nothing in it.

    Reads PyTorch's zip archives (since 1.6) and the earlier stream format, whatever the suffix.
    Tensors, parameters and arrays become np.ndarray of the same type, every dict and OrderedDict a
    dict, a torch.dtype its name, and an object of an unknown class a `Stub`. Tensors that share a
    storage may share memory.

    Raises:
      UserError: the file does not exist, is damaged, has another format or asks to run code.
    """
    with reported_as_user_errors(path):
        return _check_nesting(_parse(open_file(path)))


def _parse(file: Any) -> Any:
    buffer = file_bytes(file)
    if buffer[:4] == b"PK\3\4":
        members = Archive(file, buffer)
        pickled = io.BytesIO(members.member("data.pkl"))
        return Machine(members.storage, len(buffer)).run(pickled)
    if buffer[:1] == b"\x80":
        content = Machine(_no_storage, len(buffer)).run(file)
        if type(content) is int and content == _MAGIC:
            return _parse_stream(file, buffer)
        if isinstance(content, dict):
            return content
    if buffer[257:262] == b"ustar":
        raise Refused(
            "is a tar file, the format of PyTorch before 0.1.10: torch.load and torch.save it "
            "with a later version."
        )
    raise Refused("is neither a PyTorch checkpoint nor a pickled dict of arrays.")


def _parse_stream(file: BinaryIO, buffer: memoryview) -> Any:
    """Reads the rest of a file written by PyTorch before 1.6, after its magic number.

    The storages follow the object and carry no types, so the object is read twice: first to collect
    the types, then with the storages.
    """
    protocol, system = (Machine(_no_storage, len(buffer)).run(file) for _ in range(2))
    if protocol != _PROTOCOL or not isinstance(system, dict):
        raise Refused("is damaged, or PyTorch has never written it.")
    if system.get("little_endian") is not True:
        raise Refused("was written on a big-endian machine, which is not supported.")
    identifiers: dict[str, StorageId] = {}
    start = file.tell()

    def record(storage_id: StorageId) -> Any:
        if identifiers.setdefault(storage_id.key, storage_id)[:3] != storage_id[:3]:
            raise Refused(f"is damaged: storage {storage_id.key!a} has two types.")
        return DEFERRED

    def part(storage_id: StorageId) -> np.ndarray:
        storage = storages[storage_id.key]
        if len(storage) != storage_id.length:
            raise Refused(f"is damaged: storage {storage_id.key!a} has the wrong size.")
        if storage_id.view is None:
            return storage
        first, count = storage_id.view
        return tensor(storage, first, (count,), (1,), spend=lambda size: None)

    Machine(record, len(buffer)).run(file)
    keys = Machine(_no_storage, len(buffer)).run(file)
    dtypes = {key: storage_id.dtype for key, storage_id in identifiers.items()}
    storages = read_storages(buffer, file.tell(), keys, dtypes)
    file.seek(start)
    return Machine(part, len(buffer)).run(file)


def _no_storage(storage_id: StorageId) -> Any:
    raise Refused("is damaged: it holds a tensor where none is allowed.")


def _check_nesting(content: Any) -> Any:
    """Returns its argument; refuses containers that are nested too deep or in themselves."""
    items = [content]
    for _ in range(_MAX_DEPTH):
        boxes = {id(item): item for item in items if isinstance(item, dict | list | tuple | set)}
        items = [
            item for box in boxes.values() for item in (box.values() if type(box) is dict else box)
        ]
        if not items:
            return content
    raise Refused(f"nests more than {_MAX_DEPTH} containers, or one in itself.")


def write(
    path_or_file: Any, state: Mapping[str, np.ndarray], extra: Mapping[str, Any] | None = None
) -> None:
    """Writes arrays as a .pth that torch.load(weights_only=True) of PyTorch 1.6 or later reads.

    Equal content gives equal bytes.

    Args:
      path_or_file: a path, or a file open for writing bytes.
      state: keys to arrays of float64, float32, float16, bfloat16, int64, int32, uint8 or bool;
        each becomes a contiguous tensor.
      extra: if not None, the file holds {**extra, "state_dict": state} instead of the state itself;
        may contain numbers, strings, None, and dicts, lists and tuples of them.

    Raises:
      UserError: a value cannot be written; no file is written then.
    """
    tensors = {str(key): _writable(key, value) for key, value in state.items()}
    content = tensors if extra is None else {**extra, "state_dict": tensors}
    records: list[np.ndarray] = []
    pickled = b"\x80\x02" + _pickled(content, records) + b"."
    members = {
        "data.pkl": pickled,
        "byteorder": b"little",
        **{f"data/{number}": record for number, record in enumerate(records)},
        "version": b"3\n",
    }
    if hasattr(path_or_file, "write"):
        _write_zip(path_or_file, members)
    else:
        with epath.Path(path_or_file).open("wb") as file:
            _write_zip(file, members)


def _writable(key: str, value: Any) -> np.ndarray:
    value = np.asarray(value)
    native = value.dtype.newbyteorder("<")
    if native not in _WRITTEN:
        raise UserError(
            f"{key} is of type {value.dtype}, which cannot be written to a .pth. Supported: "
            + ", ".join(sorted(map(str, _WRITTEN)))
            + "."
        )
    return np.asarray(value, native, order="C")


def _pickled(value: Any, records: list[np.ndarray]) -> bytes:
    """Returns the opcodes of a value and appends the bytes of its arrays to `records`."""
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + struct.pack("<B", len(raw)) + raw
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, np.ndarray):
        return _pickled_tensor(value, records)
    if isinstance(value, Mapping):
        pairs = itertools.chain.from_iterable(value.items())
        return b"}(" + b"".join(_pickled(item, records) for item in pairs) + b"u"
    if isinstance(value, list | tuple):
        start, end = (b"](", b"e") if isinstance(value, list) else (b"(", b"t")
        return start + b"".join(_pickled(item, records) for item in value) + end
    raise UserError(f"extra holds a {type(value).__name__}, which cannot be written to a .pth.")


def _pickled_tensor(value: np.ndarray, records: list[np.ndarray]) -> bytes:
    """Returns a call of PyTorch's _rebuild_tensor_v2 on a storage of the tensor's own."""
    kind = _WRITTEN[value.dtype]
    strides = tuple(contiguous_strides([max(n, 1) for n in value.shape]))
    storage = [
        *(_pickled("storage", records), f"ctorch\n{kind}\n".encode()),
        *(_pickled(item, records) for item in (str(len(records)), "cpu", value.size)),
    ]
    records.append(value.reshape(-1).view(np.uint8))
    return b"".join(
        [
            b"ctorch._utils\n_rebuild_tensor_v2\n",  # the function
            *(b"((", *storage, b"tQ"),  # its first argument, a storage
            *(_pickled(item, records) for item in (0, value.shape, strides, False)),
            b"ccollections\nOrderedDict\n)RtR",  # no backward hooks; the call
        ]
    )


def _write_zip(file: BinaryIO, members: Mapping[str, Any]) -> None:
    """Writes uncompressed, aligned members with a fixed date."""
    position = 0
    with zipfile.ZipFile(file, "w") as output:
        for name, content in members.items():
            info = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # the same bytes on every system
            start = position + LOCAL_HEADER.size + len(info.filename) + 4
            padding = -start % _ALIGNMENT
            info.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
            output.writestr(info, content)
            position = start + padding + len(content)
