"""Reads the containers of PyTorch checkpoints: files, storages, tensors and zip archives.

Nothing here unpickles (`disco_jax.convert.machine` does), and nothing allocates more memory than
the size of the file. The message of a `Refused` continues a sentence that starts with the path.
"""

import contextlib
import io
import math
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from disco_jax.convert.text import shown
from disco_jax.errors import UserError

# torch.<name> of every supported element type; all files are little-endian.
DTYPES = {
    name: np.dtype(name)
    for name in (
        *("float64", "float32", "float16", "complex64", "complex128", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
# torch.<name> of each storage class -> its element type.
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
MAX_DIMS = 64  # NumPy's limit
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, name length, extra length


class Refused(Exception):
    """A file that cannot be read. The message continues a sentence that starts with its path."""


@contextlib.contextmanager
def reported_as_user_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns every exception raised inside into a `UserError` that starts with the file's path."""
    try:
        yield
    except UserError:
        raise
    except Refused as error:
        raise UserError(f"{path} {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    except Exception as error:  # damaged files raise exceptions of many types
        raise UserError(
            f"{path} is damaged or cut off ({type(error).__name__}: {shown(error)})."
        ) from error


def open_file(path: str | os.PathLike) -> Any:
    """Opens a file; a local one is memory-mapped, so that only the parts read occupy memory.

    Returns:
      An open file; `file_bytes` returns its content.

    Raises:
      UserError: `path` is not a file.
      Refused: the file is empty.
    """
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"{path} is not a file.")
    if not os.path.isfile(file):
        return io.BytesIO(file.read_bytes())
    if not os.path.getsize(file):
        raise Refused("is empty.")
    with open(file, "rb") as local:
        return mmap.mmap(local.fileno(), 0, access=mmap.ACCESS_READ)


def file_bytes(file: Any) -> memoryview:
    """Returns the content of a file opened by `open_file`."""
    return file.getbuffer() if isinstance(file, io.BytesIO) else memoryview(file)


class StorageId(NamedTuple):
    """Identifies a storage in a pickle: element type, key in the file, number of elements, view."""

    dtype: str
    key: str
    length: int
    view: tuple[int, int] | None = None  # start and length of the part used


def tensor(
    storage: np.ndarray,
    offset: int,
    size: Sequence[int],
    stride: Sequence[int],
    spend: Callable[[int], None],
) -> np.ndarray:
    """Returns the tensor stored in a storage: a view if it is contiguous there, otherwise a copy.

    Args:
      storage: [N] of any element type.
      offset: index of the first element.
      size: the shape.
      stride: the step of each dimension, in elements.
      spend: called with the bytes of a copy before it is made; raises if that is too much.

    Raises:
      Refused: the tensor reaches beyond its storage or has more elements than it.
    """
    if storage.ndim != 1 or not (are_sizes(size) and are_sizes(stride) and are_sizes((offset,))):
        raise Refused("is damaged: a tensor has an invalid shape.")
    dims, count = list(zip(size, stride, strict=True)), math.prod(size)
    if count == 0:
        return np.zeros(tuple(size), storage.dtype)
    last = offset + sum((n - 1) * step for n, step in dims)
    if last >= len(storage) or count > len(storage):
        raise Refused(f"is damaged: a tensor of {count} elements has a storage of {len(storage)}.")
    if all(
        n == 1 or step == full
        for (n, step), full in zip(dims, contiguous_strides(size), strict=True)
    ):
        return storage[offset : offset + count].reshape(size)
    spend(count * storage.itemsize)
    steps = [step * storage.itemsize if n > 1 else 0 for n, step in dims]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps).copy()


def are_sizes(sizes: Sequence[int]) -> bool:
    """Returns whether these are valid sizes: at most `MAX_DIMS` integers in [0, 2^63)."""
    return len(sizes) <= MAX_DIMS and all(type(n) is int and 0 <= n < 2**63 for n in sizes)


def contiguous_strides(size: Sequence[int]) -> list[int]:
    """Returns the strides of a contiguous tensor, in elements."""
    return [math.prod(size[axis + 1 :]) for axis in range(len(size))]


def copy_elements(buffer: memoryview, start: int, count: int, dtype: str) -> np.ndarray:
    """Copies `count` little-endian elements that start at byte `start` of the file.

    Raises:
      Refused: the file is too short.
    """
    size = count * DTYPES[dtype].itemsize
    if count < 0 or start + size > len(buffer):
        raise Refused("is cut off: it ends before its last tensor.")
    raw = np.frombuffer(buffer[start : start + size], np.uint8)
    return raw != 0 if dtype == "bool" else raw.copy().view(DTYPES[dtype])


def read_storages(
    buffer: memoryview, start: int, keys: Iterable[str], dtypes: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Reads the storages at the end of a file written by PyTorch before 1.6.

    Each storage is an int64 number of elements, followed by the elements.

    Args:
      buffer: the file.
      start: the byte at which the first storage starts.
      keys: of the storages, in file order.
      dtypes: the element type of each key.

    Raises:
      Refused: the file is cut off, or its list of storages does not match its tensors.
    """
    storages = {}
    for key in keys:
        if type(key) is not str or key in storages or key not in dtypes:
            raise Refused("is damaged: its list of storages does not match its tensors.")
        (count,) = copy_elements(buffer, start, 1, "int64")
        storages[key] = copy_elements(buffer, start + 8, int(count), dtypes[key])
        start += 8 + storages[key].nbytes
    return storages


class Archive:
    """A zip archive written by torch.save. Each storage is copied on its first use."""

    def __init__(self, file: BinaryIO, buffer: memoryview):
        with zipfile.ZipFile(file) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        names = [info.filename for info in infos]
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if not pickles:
            raise Refused("is a zip archive, but torch.save did not write it.")
        root = min(pickles, key=len).removesuffix("/data.pkl")
        if any(name.startswith((f"{root}/constants.pkl", f"{root}/code/")) for name in names):
            raise Refused(
                "is a TorchScript archive, a program with weights in it: save model.state_dict() "
                "instead."
            )
        self._members = _members(infos, buffer)
        self._storages: dict[tuple[str, str, int], np.ndarray] = {}
        self._root = root
        if f"{root}/byteorder" in self._members and self.member("byteorder") != b"little":
            raise Refused("was written on a big-endian machine, which is not supported.")

    def member(self, name: str) -> memoryview:
        """Returns the content of a member and verifies its checksum.

        A checksum of zero is ignored: torch.save can leave checksums out.
        """
        if f"{self._root}/{name}" not in self._members:
            raise Refused(f"is damaged: {name!a} is not in the archive.")
        content, checksum = self._members[f"{self._root}/{name}"]
        if checksum not in (0, zlib.crc32(content)):
            raise Refused(f"is damaged: the checksum of {name!a} is wrong.")
        return content

    def storage(self, storage_id: StorageId) -> np.ndarray:
        """Returns the elements of a storage; repeated calls return the same array."""
        identity = storage_id[:3]
        if identity not in self._storages:
            content = self.member(f"data/{storage_id.key}")
            if storage_id.length * DTYPES[storage_id.dtype].itemsize != len(content):
                raise Refused(f"is damaged: storage {storage_id.key!a} has the wrong size.")
            self._storages[identity] = copy_elements(
                content, 0, storage_id.length, storage_id.dtype
            )
        return self._storages[identity]


def _members(
    infos: Iterable[zipfile.ZipInfo], buffer: memoryview
) -> dict[str, tuple[memoryview, int]]:
    """Returns (content, CRC-32) of every member; refuses compressed or overlapping members."""
    members, previous_end = {}, 0
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise Refused(
                "is a compressed or encrypted zip archive, which torch.save never writes."
            )
        start = info.header_offset
        if start < previous_end or info.compress_size != info.file_size or info.filename in members:
            raise Refused("is damaged: the members of its zip archive overlap.")
        signature, *lengths = LOCAL_HEADER.unpack_from(buffer, start)
        start += LOCAL_HEADER.size + sum(lengths)
        previous_end = start + info.file_size
        if signature != b"PK\3\4" or previous_end > len(buffer):
            raise Refused("is damaged: its zip archive lists members that it does not contain.")
        members[info.filename] = buffer[start:previous_end], info.CRC
    return members
