"""Files that are whole or not there, damaged ones, what a killed start may leave, full storage."""

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

LOCK = "lock"  # held while a run writes to its directory
LEASE = "lease.json"  # the same, where the file system has no locks
IMPORTING = "import_unfinished"  # there until an import is complete
PROGRAMS = "xla_cache"  # compiled programs, for the next start
# What a system answers where there is no room, or no right, to write.
_REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
)
# TensorStore, which writes checkpoints, has the number in its words alone.
_NUMBER = re.compile(r"os_error_code='(\d+)'")
_UNFINISHED = re.compile(r"\..+\.\d+")  # names that `whole` writes to
# Those of files that only the holder of a directory writes.
_OF_HOLDER = re.compile(
    r"\.(config|environment|data|saved|goodput|manifest|targets)\.json\.\d+"
    rf"|\.(metrics\.jsonl|{IMPORTING})\.\d+"
)
_LOCKS = re.compile(rf"{LOCK}(_\w+)?(\.{LEASE})?|{LEASE}")


@contextlib.contextmanager
def whole(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a path to write to, which becomes `path` when the context ends without an exception.

    Until then a file that was there stays as it is; after an exception nothing new is left. What
    was written survives a power failure once the context has ended.
    """
    path = epath.Path(path)
    if "://" in str(path):  # an object store shows no object before it is whole
        yield path
        return
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, path)
        sync(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def sync(path: epath.PathLike) -> None:
    """Waits until a local file, or the entries of a directory, are on the disk itself.

    File systems that cannot do this (some of networks refuse it for directories) are left alone.
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
    """Waits until a local directory with all that is below it is on the disk itself."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync(os.path.join(place, name))
        sync(place)
    sync(os.path.dirname(os.fspath(folder)))


def is_running(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of somebody else
        pass
    return True


def set_aside(path: epath.Path, why: str = "damaged") -> epath.Path:
    """Renames a file or folder to NAME.WHY, or NAME.WHY.2 and so on; returns the new path."""
    number, target = 1, path.with_name(f"{path.name}.{why}")
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.{why}.{number}")
    path.rename(target)
    return target


def read_json(path: epath.PathLike, kind: type | tuple[type, ...] = dict) -> Any:
    """Returns what a JSON file holds.

    Args:
      path: the file.
      kind: that the outermost value must be of.

    Raises:
      UserError: the file is damaged: it holds no JSON, or a value of another kind.
      OSError: it cannot be read.
    """
    try:
        value = json.loads(epath.Path(path).read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it holds no JSON ({error}).") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} is damaged: it holds a {type(value).__name__}.")
    return value


def read_or_set_aside(path: epath.Path, kind: type | tuple[type, ...] = dict) -> Any:
    """Returns what a JSON file holds; None where there is no file, or it was damaged.

    A damaged file is renamed with a warning, so that it is neither lost nor in the way.
    """
    if not path.exists():
        return None
    try:
        return read_json(path, kind)
    except UserError as error:
        _LOG.warning("%s Kept as %s; a new one is begun.", error, set_aside(path).name)
        return None


def write_arrays(
    file: BinaryIO, arrays: "Mapping[str, np.ndarray]", compress: bool = False
) -> None:
    """Writes an .npz, compressed or not.

    Args:
      file: open to write bytes.
      arrays: by name; none is called "file" or "allow_pickle".
      compress: with zlib.
    """
    import numpy as np

    save = np.savez_compressed if compress else np.savez
    save(file, **arrays)  # type: ignore[arg-type]  # which might name `allow_pickle`, says NumPy


def is_free(folder: epath.PathLike) -> bool:
    """Whether a directory can be taken: it is not there yet, or holds nothing of anybody else.

    What a start of this package leaves in a directory before it is the run's does not count: the
    lock, compiled programs, and files that a killed process did not finish.
    """
    folder = epath.Path(folder)
    if not folder.exists():
        return True
    return folder.is_dir() and all(_is_remnant(entry.name) for entry in folder.iterdir())


def remove_unfinished(folder: epath.Path) -> None:
    """Removes files that killed starts did not finish; for the holder of a directory alone."""
    for entry in folder.iterdir():
        if _OF_HOLDER.fullmatch(entry.name):
            entry.unlink()


def _is_remnant(name: str) -> bool:
    return name in (IMPORTING, PROGRAMS) or bool(
        _LOCKS.fullmatch(name) or _UNFINISHED.fullmatch(name)
    )


def refusal(error: BaseException) -> str:
    """What the storage said, with the file, if that is why a file was not written; else "".

    Args:
      error: of anything that writes files.
    """
    number, place = getattr(error, "errno", None), getattr(error, "filename", None)
    if not isinstance(error, OSError):
        found = _NUMBER.search(str(error))
        number, place = int(found[1]) if found else None, "a checkpoint"
    if number not in _REFUSALS:
        return ""
    return f"{place or 'a file'}: {os.strerror(number)}"
