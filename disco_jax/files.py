"""Files that are whole or not there, what a refused or killed start may leave, full storage."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, BinaryIO

from etils import epath

if TYPE_CHECKING:
    import numpy as np

LOCK = "lock"  # held while a run writes to its directory
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


@contextlib.contextmanager
def whole(path: epath.PathLike) -> Iterator[epath.Path]:
    """A path to write to, which becomes `path` when the context ends without an exception.

    Until then a file that was there stays as it is; after an exception nothing new is left.
    """
    path = epath.Path(path)
    if "://" in str(path):  # an object store shows no object before it is whole
        yield path
        return
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


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


def _is_remnant(name: str) -> bool:
    return name in (LOCK, PROGRAMS) or _UNFINISHED.fullmatch(name) is not None


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
