"""Random access to TFRecord files through an index of the positions of their records.

A TFRecord file is a sequence of records: the length of the data (u64), a checksum of the length
(u32), the data, and a checksum of the data (u32), all little-endian. The position of a record
follows from the lengths of all records before it, so the index is built once and stored.
"""

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np
from etils import epath

from disco_jax.data import contract
from disco_jax.errors import UserError
from disco_jax.files import refusal, user_cache, whole, write_arrays

_LOG = logging.getLogger(__name__)

_HEADER, _CHECKSUM = 12, 4  # bytes before and after the data of a record
_BLOCK = 8 * 2**20  # bytes per request when a file in a bucket is read as a whole
_THREADS = 32  # files or records read at a time; reading waits for the storage
_FILES, _ENDS, _COUNTS = "files", "ends", "counts"  # arrays of a stored index


class RecordIndex:
    """A reader of single records of TFRecord files."""

    def __init__(self, ends: Mapping[str, np.ndarray]):
        """Creates a reader.

        Args:
          ends: path of a file -> i64[n], the offset in bytes after each of its records.
        """
        self._ends = ends
        self._pool = ThreadPoolExecutor(_THREADS)

    def read(self, places: Sequence[tuple[str, int]]) -> Iterator[bytes]:
        """Returns the data of some records, in order; several are read at a time.

        The checksums of the data are not compared.

        Args:
          places: (file, index of the record in it) of each record.

        Raises:
          UserError: a file has changed since it was indexed.
        """
        return self._pool.map(self._read, places)

    def _read(self, place: tuple[str, int]) -> bytes:
        path, number = place
        ends = self._ends[path]
        start = int(ends[number - 1]) if number else 0
        with _opened(path) as file:
            file.seek(start)
            record = file.read(int(ends[number]) - start)
        length = len(record) - _HEADER - _CHECKSUM
        if length < 0 or _data_length(record) != length:
            raise UserError(
                f"{path} has no record of {length} bytes at byte {start}: it has changed while it "
                "was read, or is damaged. Start again, or prepare the data set again."
            )
        return record[_HEADER:-_CHECKSUM]


def open_index(files: Sequence[str], counts: Sequence[int], name: str) -> dict[str, np.ndarray]:
    """Loads the index of some TFRecord files; builds and stores it if there is none.

    It is stored beside the files, or in the user's cache if they cannot be written there. Hosts
    do not wait for each other: each one loads a complete index or builds its own, and the file is
    replaced as a whole. An index of other files (other names or sizes) is built again.

    Args:
      files: paths of the files of one folder.
      counts: number of records of each file according to the data set's metadata.
      name: name of the data set and split, e.g. "imagenet2012-train".

    Returns:
      Path of a file -> i64[n], the offset in bytes after each of its records.

    Raises:
      UserError: a file is damaged or has another number of records.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(_size, files))
    names = [os.path.basename(path) for path in files]
    described = json.dumps(list(zip(names, sizes, strict=True)))
    beside = epath.Path(files[0]).parent / f"{name}.index.npz"
    checksum = contract.checksum([described.encode()])
    cached = epath.Path(user_cache()) / "records" / f"{name}.{checksum:08x}.index.npz"
    for path in (beside, cached):
        ends = _load(path, described)
        if ends is not None:
            return dict(zip(files, ends, strict=True))
    ends = _build(files, sizes, counts, name)
    _store((beside, cached), described, ends)
    return dict(zip(files, ends, strict=True))


def _load(path: epath.Path, described: str) -> list[np.ndarray] | None:
    """Returns the ends of the records of each file, or None if there is no index of these files."""
    try:
        if not path.exists():
            return None
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in (_FILES, _ENDS, _COUNTS)}
    except Exception as error:  # NumPy, zipfile and zlib raise many kinds for a damaged file
        _LOG.warning("%s cannot be read (%s); it is built again.", path, error)
        return None
    if str(arrays[_FILES]) != described:
        _LOG.warning("%s belongs to other TFRecord files; it is built again.", path)
        return None
    return np.split(arrays[_ENDS], np.cumsum(arrays[_COUNTS])[:-1])


def _build(
    files: Sequence[str], sizes: Sequence[int], counts: Sequence[int], name: str
) -> list[np.ndarray]:
    """Returns the ends of the records of each file."""
    _LOG.info("Indexing the %d TFRecord files of %s for random access, once.", len(files), name)
    began = time.monotonic()
    with ThreadPoolExecutor(_THREADS) as pool:
        ends = list(pool.map(_ends, files, sizes))
    for path, file_ends, count in zip(files, ends, counts, strict=True):
        if len(file_ends) != count:
            raise UserError(
                f"{path} has {len(file_ends)} records, but the metadata of the data set state "
                f"{count}; prepare the data set again."
            )
    _LOG.info("Indexed %d records in %.1f s.", sum(counts), time.monotonic() - began)
    return ends


def _store(places: Sequence[epath.Path], described: str, ends: Sequence[np.ndarray]) -> None:
    """Writes the index to the first place that can be written."""
    arrays = {
        _FILES: np.array(described),
        _ENDS: np.concatenate(ends),
        _COUNTS: np.array([len(file_ends) for file_ends in ends]),
    }
    for path in places:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Hosts that share a folder may have equal process numbers.
            with whole(path, owner=socket.gethostname()) as unfinished, unfinished.open("wb") as f:
                write_arrays(f, arrays, compress=True)
        except Exception as error:
            _LOG.info("The index cannot be stored as %s (%s).", path, refusal(error) or error)
            continue
        _LOG.info("Stored the index as %s.", path)
        return
    _LOG.warning("The index is stored nowhere: the next start builds it again.")


def _ends(path: str, size: int) -> np.ndarray:
    """Returns i64[n], the offset after each record of a file of `size` bytes."""
    ends, end = [], 0
    with _header_reader(path) as header_at:
        while end < size:
            header = header_at(end)
            if len(header) == _HEADER:
                end += _HEADER + _data_length(header) + _CHECKSUM
            if len(header) < _HEADER or end > size:
                raise UserError(f"{path} is cut short or damaged; prepare the data set again.")
            ends.append(end)
    return np.array(ends, np.int64)


@contextlib.contextmanager
def _header_reader(path: str) -> Iterator[Callable[[int], bytes]]:
    """Yields a function that returns the 12 bytes at an offset; offsets must increase.

    Local files are read at the offsets only. Files in a bucket are read as a whole, because a
    request per record would take longer.
    """
    with _opened(path) as file:
        if _is_remote(path):
            yield _Blocks(file).header
            return
        number = file.fileno()
        with contextlib.suppress(AttributeError):  # absent on some systems
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_RANDOM)  # do not read ahead
        yield lambda offset: os.pread(number, _HEADER, offset)


class _Blocks:
    """The bytes of a file, read forwards in large blocks."""

    def __init__(self, file: BinaryIO):
        self._file, self._start, self._block = file, 0, b""

    def header(self, offset: int) -> bytes:
        """Returns the 12 bytes at `offset`, fewer at the end of the file."""
        while self._start + len(self._block) < offset + _HEADER:
            following = self._file.read(_BLOCK)
            if not following:
                break
            past = min(offset - self._start, len(self._block))
            self._block = self._block[past:] + following
            self._start += past
        return self._block[offset - self._start :][:_HEADER]


def _data_length(header: bytes) -> int:
    """Returns the length of the data of a record, from its first 8 bytes."""
    return int.from_bytes(header[:8], "little")


def _is_remote(path: str) -> bool:
    return "://" in path


def _opened(path: str) -> BinaryIO:
    return epath.Path(path).open("rb") if _is_remote(path) else open(path, "rb", buffering=0)


def _size(path: str) -> int:
    return epath.Path(path).stat().length
