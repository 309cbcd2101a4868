"""What stands around the pickle of a PyTorch checkpoint: files, storages, tensors, zip archives.

Nothing here unpickles (`disco_jax.convert.machine` does), and nothing allocates more than the file
holds. `Refused` completes a sentence that begins with the path of the file.
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

# torch.<name> of every element type that is read; all files are little-endian.
DTYPES = {
    name: np.dtype(name)
    for name in (
        *("float64", "float32", "float16", "complex64", "complex128", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
# torch.<name> of the classes of storages, to the type of their elements.
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
DIMS = 64  # that an array of NumPy can have
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra


class Refused(Exception):
    """Why a file is not read: the rest of a sentence that begins with its path."""


@contextlib.contextmanager
def told_of(path: str | os.PathLike) -> Iterator[None]:
    """Inside, whatever goes wrong is a `UserError` that begins with the path of the file."""
    try:
        yield
    except UserError:
        raise
    except Refused as error:
        raise UserError(f"{path} {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    except Exception as error:  # files break in as many ways as there are bytes
        raise UserError(
            f"{path} is damaged or cut off ({type(error).__name__}: {shown(error)})."
        ) from error


def opened(path: str | os.PathLike) -> Any:
    """The content of a file, in memory only where it is read if the file is a local one.

    Returns:
      An open file: `view` gives its bytes.
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


def view(file: Any) -> memoryview:
    """The bytes of a file from `opened`."""
    return file.getbuffer() if isinstance(file, io.BytesIO) else memoryview(file)


class StorageId(NamedTuple):
    """How a pickle names a storage: element type, key in the file, number of elements, view."""

    dtype: str
    key: str
    length: int
    view: tuple[int, int] | None = None  # the part that is meant: its start and length


def tensor(
    storage: np.ndarray,
    offset: int,
    size: Sequence[int],
    stride: Sequence[int],
    spend: Callable[[int], None],
) -> np.ndarray:
    """The tensor that lies in a storage: a view if it is contiguous there, else a copy.

    Args:
      storage: [N] of any element type.
      offset: the first element.
      size: the shape.
      stride: the step of each dimension, in elements.
      spend: told the bytes of a copy before it is made; raises if that is too much.

    Raises:
      Refused: when the tensor reaches out of its storage or has more elements than it.
    """
    if storage.ndim != 1 or not (proper(size) and proper(stride) and proper((offset,))):
        raise Refused("is damaged: a tensor has no proper shape.")
    dims, count = list(zip(size, stride, strict=True)), math.prod(size)
    if count == 0:
        return np.zeros(tuple(size), storage.dtype)
    last = offset + sum((n - 1) * step for n, step in dims)
    if last >= len(storage) or count > len(storage):
        raise Refused(f"is damaged: a tensor of {count} elements has a storage of {len(storage)}.")
    if all(n == 1 or step == full for (n, step), full in zip(dims, dense(size), strict=True)):
        return storage[offset : offset + count].reshape(size)
    spend(count * storage.itemsize)
    steps = [step * storage.itemsize if n > 1 else 0 for n, step in dims]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps).copy()


def proper(sizes: Sequence[int]) -> bool:
    """Whether these can be sizes: not too many, not too large and not negative."""
    return len(sizes) <= DIMS and all(type(n) is int and 0 <= n < 2**63 for n in sizes)


def dense(size: Sequence[int]) -> list[int]:
    """The strides of a contiguous tensor, in elements."""
    return [math.prod(size[axis + 1 :]) for axis in range(len(size))]


def take(buffer: memoryview, start: int, count: int, dtype: str) -> np.ndarray:
    """A copy of `count` little-endian elements at a byte of the file.

    Raises:
      Refused: when the file ends before.
    """
    size = count * DTYPES[dtype].itemsize
    if count < 0 or start + size > len(buffer):
        raise Refused("is cut off: it ends before its last tensor does.")
    raw = np.frombuffer(buffer[start : start + size], np.uint8)
    return raw != 0 if dtype == "bool" else raw.copy().view(DTYPES[dtype])


def stream(
    buffer: memoryview, start: int, keys: Iterable[str], dtypes: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """The storages that end a file of PyTorch before 1.6: i64 number of elements, elements, ...

    Args:
      buffer: the file.
      start: the byte where they begin.
      keys: of the storages, in their order.
      dtypes: the element type of each key.
    """
    storages = {}
    for key in keys:
        if type(key) is not str or key in storages or key not in dtypes:
            raise Refused("is damaged: its list of storages does not fit its tensors.")
        (count,) = take(buffer, start, 1, "int64")
        storages[key] = take(buffer, start + 8, int(count), dtypes[key])
        start += 8 + storages[key].nbytes
    return storages


class Archive:
    """A zip archive of torch.save, each storage copied out once, when it is first asked for."""

    def __init__(self, file: BinaryIO, buffer: memoryview):
        with zipfile.ZipFile(file) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        names = [info.filename for info in infos]
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if not pickles:
            raise Refused("is a zip archive, but not one of torch.save.")
        root = min(pickles, key=len).removesuffix("/data.pkl")
        if any(name.startswith((f"{root}/constants.pkl", f"{root}/code/")) for name in names):
            raise Refused(
                "is a TorchScript archive, a program with weights in it; save the state_dict() of "
                "the model instead."
            )
        self._members = _members(infos, buffer)
        self._storages: dict[tuple[str, str, int], np.ndarray] = {}
        self._root = root
        if f"{root}/byteorder" in self._members and self.member("byteorder") != b"little":
            raise Refused("was written on a big-endian machine, which is not supported.")

    def member(self, name: str) -> memoryview:
        """The content of a member; a checksum of zero means that torch.save made none."""
        if f"{self._root}/{name}" not in self._members:
            raise Refused(f"is damaged: {name!a} is not in the archive.")
        content, checksum = self._members[f"{self._root}/{name}"]
        if checksum not in (0, zlib.crc32(content)):
            raise Refused(f"is damaged: the checksum of {name!a} is wrong.")
        return content

    def storage(self, name: StorageId) -> np.ndarray:
        """The storage of that name."""
        same = name[:3]
        if same not in self._storages:
            content = self.member(f"data/{name.key}")
            if name.length * DTYPES[name.dtype].itemsize != len(content):
                raise Refused(f"is damaged: storage {name.key!a} has another size.")
            self._storages[same] = take(content, 0, name.length, name.dtype)
        return self._storages[same]


def _members(
    infos: Iterable[zipfile.ZipInfo], buffer: memoryview
) -> dict[str, tuple[memoryview, int]]:
    """(content, CRC-32) of every member; they are stored as they are and do not overlap."""
    members, free = {}, 0
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise Refused("is a compressed or encrypted zip archive, which torch.save never makes.")
        start = info.header_offset
        if start < free or info.compress_size != info.file_size or info.filename in members:
            raise Refused("is damaged: the members of its zip archive overlap.")
        signature, *lengths = LOCAL_HEADER.unpack_from(buffer, start)
        start += LOCAL_HEADER.size + sum(lengths)
        free = start + info.file_size
        if signature != b"PK\3\4" or free > len(buffer):
            raise Refused("is damaged: its zip archive lists members that it does not have.")
        members[info.filename] = buffer[start:free], info.CRC
    return members
