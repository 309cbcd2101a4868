"""Files that are whole or not there."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath


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
