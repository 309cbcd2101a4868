"""That one start at a time writes to a directory.

A local directory is held by a lock of the file system, which ends with the process, however it
ends. Where there are no locks (buckets, NFS without its lock service, some of Lustre) a file says
who holds the directory, and is written anew every few seconds: a process that finds it unchanged
for several times as long takes the directory over.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from disco_jax.errors import UserError
from disco_jax.files import LEASE, LOCK, is_running, whole

_LOG = logging.getLogger(__name__)

# Seconds between two signs of life, and how many of them may be missed.
BEAT_S = 10.0
_MISSED = 3
# Seconds after which a new holder looks whether another one wrote at the same moment.
SETTLE_S = 1.0
# What a file system without locks answers.
_NO_LOCKS = errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL


@contextlib.contextmanager
def held(path: epath.Path, name: str = LOCK) -> Iterator[None]:
    """Holds a directory against other starts, for as long as the context lasts.

    Args:
      path: the directory, which exists.
      name: of the lock, where several starts may share a directory.

    Raises:
      UserError: another start holds it.
      OSError: it cannot be written.
    """
    if "://" in str(path):
        with _leased(path, name):
            yield
        return
    with open(path / name, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(path) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _LOG.warning(
                "The file system of %s has no locks (%s): %s tells other starts that the "
                "directory is in use.",
                path,
                error.strerror,
                LEASE,
            )
            with _leased(path, name):
                yield
            return
        yield


def _taken(path: epath.Path, by: str = "") -> UserError:
    return UserError(
        f"Another run is writing to --workdir={path}{by}. Wait for it or give another."
    )


@contextlib.contextmanager
def _leased(path: epath.Path, name: str) -> Iterator[None]:
    file = path / (LEASE if name == LOCK else f"{name}.{LEASE}")
    _wait_until_left(path, file)
    me = uuid.uuid4().hex
    _renew(file, me)
    time.sleep(SETTLE_S)
    other = _read(file)
    if other.get("owner") != me:
        raise _taken(path, _by(other))
    done = threading.Event()
    thread = threading.Thread(target=_keep, args=(file, me, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if _read(file).get("owner") == me:
            file.unlink(missing_ok=True)


def _wait_until_left(path: epath.Path, file: epath.Path) -> None:
    """Returns when nobody holds the directory; refuses it where somebody shows that they do."""
    first = _read(file)
    if not first or _has_ended(first):
        return
    # The clocks of two machines may differ: what counts is whether the file changes.
    end = time.monotonic() + _MISSED * BEAT_S
    _LOG.info("%s was in use%s; looking whether it still is.", path, _by(first))
    while time.monotonic() < end:
        time.sleep(BEAT_S / 4)
        now = _read(file)
        if not now:
            return
        if now != first:
            raise _taken(path, _by(now))


def _has_ended(lease: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is gone."""
    if lease.get("host") != socket.gethostname() or not isinstance(lease.get("pid"), int):
        return False
    return not is_running(lease["pid"])


def _keep(file: epath.Path, me: str, done: threading.Event) -> None:
    """Shows signs of life until `done`; ends the process when another one took over."""
    beat = 0
    while not done.wait(BEAT_S):
        beat += 1
        try:
            other = _read(file)
            if other and other.get("owner") != me:
                print(
                    f"disco-jax: {file.parent} was taken over{_by(other)}, as this process gave "
                    "no sign of life for too long. It ends here, and writes nothing more.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
            _renew(file, me, beat)
        except OSError as error:  # of a network that may come back
            _LOG.warning("%s cannot be renewed: %s", file, error)


def _renew(file: epath.Path, me: str, beat: int = 0) -> None:
    lease = {"owner": me, "host": socket.gethostname(), "pid": os.getpid(), "beat": beat}
    with whole(file) as place:
        place.write_text(json.dumps(lease) + "\n")


def _read(file: epath.Path) -> dict[str, Any]:
    """Returns the lease; {} where there is none that can be understood."""
    try:
        found = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _by(lease: dict[str, Any]) -> str:
    return f" (process {lease.get('pid')} on {lease.get('host')})" if lease else ""
