"""Atomic writes, handling of damaged and leftover files, and messages for full storage."""

import contextlib
import errno
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from etils import epath

from disco_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

_LOG = logging.getLogger(__name__)

LOCK = "lock"  # locked while a run writes to its directory
LEASE = "lease.json"  # replaces the lock on file systems without locks
IMPORTING = "import_unfinished"  # exists until an import is complete
PROGRAMS = "xla_cache"  # JAX's compilation cache
# Error numbers of full or read-only storage.
_REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
)
# TensorStore, which writes checkpoints, reports the error number only in its message.
_NUMBER = re.compile(r"os_error_code='(\d+)'")
# Module of TensorFlow's exceptions, compared by name because the import takes seconds.
_TENSORFLOW_ERRORS = "tensorflow.python.framework.errors_impl"
_UNFINISHED = re.compile(r"\..+\.\d+")  # temporary names of `whole`
# Temporary names of files that only the process with the directory's lock writes.
_LOCK_HOLDER_FILES = re.compile(
    r"\.(config|environment|data|saved|goodput|manifest|targets)\.json\.\d+"
    rf"|\.(metrics\.jsonl|{IMPORTING})\.\d+"
)
_LOCKS = re.compile(rf"{LOCK}(_\w+)?(\.{LEASE})?|{LEASE}")


@contextlib.contextmanager
def whole(path: epath.PathLike, owner: str = "") -> Iterator[epath.Path]:
    """Yields a temporary path and renames it to `path` if the context ends without an exception.

    An existing file stays unchanged until then. After an exception the temporary file is removed.
    When the context has ended, the file is synced to disk and survives a power failure.

    Args:
      path: the file.
      owner: part of the temporary name, for files that several machines write at the same time.
    """
    path = epath.Path(path)
    if "://" in str(path):  # object stores publish an object only once it is complete
        yield path
        return
    unfinished = path.with_name(f".{path.name}{owner and f'.{owner}'}.{os.getpid()}")
    try:
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, path)
        sync(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def user_cache() -> str:
    """Returns the path of this package's folder in the user's cache; it may be missing."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "disco_jax")


def sync(path: epath.PathLike) -> None:
    """Calls fsync on a local file or directory.

    Errors of file systems that do not support fsync are ignored; some network file systems refuse
    it for directories.
    """
    with contextlib.suppress(FileNotFoundError):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EROFS):
                raise
        finally:
            os.close(number)


def sync_tree(folder: epath.PathLike) -> None:
    """Calls fsync on a local directory, everything below it, and its parent."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync(os.path.join(place, name))
        sync(place)
    sync(os.path.dirname(os.fspath(folder)))


def is_running(process: int) -> bool:
    """Returns True if a process with this id runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # the process belongs to another user
        pass
    return True


def set_aside(path: epath.Path, why: str = "damaged") -> epath.Path:
    """Renames a file or folder to NAME.WHY, or to NAME.WHY.2 etc.; returns the new path."""
    number, target = 1, path.with_name(f"{path.name}.{why}")
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.{why}.{number}")
    path.rename(target)
    return target


def read_json(path: epath.PathLike, kind: type | tuple[type, ...] = dict) -> Any:
    """Returns the content of a JSON file.

    Args:
      path: the file.
      kind: required type of the outermost value.

    Raises:
      UserError: the file is damaged: it is not valid JSON, or of another type.
      OSError: the file cannot be read.
    """
    try:
        value = json.loads(epath.Path(path).read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is not valid JSON ({error}).") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} is damaged: it contains a {type(value).__name__}.")
    return value


def read_or_set_aside(path: epath.Path, kind: type | tuple[type, ...] = dict) -> Any:
    """Returns the content of a JSON file; None if the file is missing or damaged.

    A damaged file is renamed and a warning is logged.
    """
    if not path.exists():
        return None
    try:
        return read_json(path, kind)
    except UserError as error:
        _LOG.warning("%s Renamed to %s; starting a new file.", error, set_aside(path).name)
        return None


def write_arrays(
    file: BinaryIO, arrays: "Mapping[str, np.ndarray]", compress: bool = False
) -> None:
    """Writes arrays in NumPy's .npz format.

    Args:
      file: binary file opened for writing.
      arrays: name -> array; "file" and "allow_pickle" are not valid names.
      compress: compress with zlib.
    """
    import numpy as np

    save = np.savez_compressed if compress else np.savez
    save(file, **arrays)  # type: ignore[arg-type]  # a name could collide with `allow_pickle`


def is_free(folder: epath.PathLike) -> bool:
    """Returns True if a directory does not exist, or contains no foreign files.

    Files that a start of this package creates before it owns the directory do not count: the lock,
    compiled programs, and unfinished files of killed processes.
    """
    folder = epath.Path(folder)
    if not folder.exists():
        return True
    return folder.is_dir() and all(_is_remnant(entry.name) for entry in folder.iterdir())


def remove_unfinished(folder: epath.Path) -> None:
    """Removes unfinished files of killed starts. The caller must hold the directory's lock."""
    for entry in folder.iterdir():
        if _LOCK_HOLDER_FILES.fullmatch(entry.name):
            entry.unlink()


def _is_remnant(name: str) -> bool:
    return name in (IMPORTING, PROGRAMS) or bool(
        _LOCKS.fullmatch(name) or _UNFINISHED.fullmatch(name)
    )


def refusal(error: BaseException) -> str:
    """Returns "FILE: reason" if an error was caused by full or read-only storage, else "".

    Args:
      error: an exception raised while writing files.
    """
    number, place = getattr(error, "errno", None), getattr(error, "filename", None)
    if not isinstance(error, OSError):
        match = _NUMBER.search(str(error))
        number, place = int(match[1]) if match else None, "a checkpoint"
    if number not in _REFUSALS:
        return ""
    return f"{place or 'a file'}: {os.strerror(number)}"


def bucket_error(error: BaseException) -> str:
    """Returns the reason if a bucket could not be reached, read or written, else "".

    Buckets are read through TensorFlow, whose exceptions state the address in their message.

    Args:
      error: an exception raised while reading or writing files.
    """
    if type(error).__module__ != _TENSORFLOW_ERRORS or "://" not in str(error):
        return ""
    return " ".join(str(error).split())
