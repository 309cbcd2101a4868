"""Locks and leases that give one process at a time write access to a directory.

A local directory is protected by a file-system lock, which the kernel releases when the process
ends for any reason. Storage without locks (buckets, NFS without its lock service, some Lustre) uses
a lease file instead. It names the holder, which rewrites it every few seconds. A process that sees
an unchanged lease for several times this period takes over the directory.
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

# Seconds between two heartbeats, and the number of missed heartbeats after which a lease expires.
BEAT_S = 10.0
_MAX_MISSED = 3
# Seconds after which a new holder checks whether another one wrote the lease at the same time.
SETTLE_S = 1.0
# Errors of a file system without locks.
_NO_LOCKS = errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL


@contextlib.contextmanager
def held(path: epath.Path, name: str = LOCK) -> Iterator[None]:
    """Locks a directory while the context lasts.

    Args:
      path: an existing directory.
      name: name of the lock; processes with different names may share a directory.

    Raises:
      UserError: another process holds the lock.
      OSError: the directory cannot be written.
    """
    if "://" in str(path):
        with _leased(path, name):
            yield
        return
    with open(path / name, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(path) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _LOG.warning(
                "The file system of %s does not support locks (%s); %s is used instead to mark "
                "the directory as in use.",
                path,
                error.strerror,
                LEASE,
            )
            with _leased(path, name):
                yield
            return
        yield


def _in_use(path: epath.Path, holder: str = "") -> UserError:
    return UserError(
        f"Another run is writing to --workdir={path}{holder}. Wait for it to end or give another "
        "--workdir."
    )


@contextlib.contextmanager
def _leased(path: epath.Path, name: str) -> Iterator[None]:
    file = path / (LEASE if name == LOCK else f"{name}.{LEASE}")
    _wait_until_expired(path, file)
    owner = uuid.uuid4().hex
    _renew(file, owner)
    time.sleep(SETTLE_S)
    lease = _read(file)
    if lease.get("owner") != owner:
        raise _in_use(path, _holder(lease))
    stop = threading.Event()
    thread = threading.Thread(target=_renew_until, args=(file, owner, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if _read(file).get("owner") == owner:
            file.unlink(missing_ok=True)


def _wait_until_expired(path: epath.Path, file: epath.Path) -> None:
    """Waits until a lease is released or expires; raises UserError if its holder renews it."""
    initial = _read(file)
    if not initial or _has_ended(initial):
        return
    # Only changes of the file count, because the clocks of two machines may differ.
    end = time.monotonic() + _MAX_MISSED * BEAT_S
    _LOG.info("%s was in use%s; checking whether it still is.", path, _holder(initial))
    while time.monotonic() < end:
        time.sleep(BEAT_S / 4)
        current = _read(file)
        if not current:
            return
        if current != initial:
            raise _in_use(path, _holder(current))


def _has_ended(lease: dict[str, Any]) -> bool:
    """Returns whether the holder was a process of this machine that has ended."""
    if lease.get("host") != socket.gethostname() or not isinstance(lease.get("pid"), int):
        return False
    return not is_running(lease["pid"])


def _renew_until(file: epath.Path, owner: str, stop: threading.Event) -> None:
    """Renews the lease until `stop` is set; ends the process if another one has taken over."""
    beat = 0
    while not stop.wait(BEAT_S):
        beat += 1
        try:
            lease = _read(file)
            if lease and lease.get("owner") != owner:
                print(
                    f"disco-jax: {file.parent} was taken over{_holder(lease)}, because this "
                    "process did not renew its lease in time. This process ends and writes "
                    "nothing more.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
            _renew(file, owner, beat)
        except OSError as error:  # the network may recover
            _LOG.warning("%s cannot be renewed: %s", file, error)


def _renew(file: epath.Path, owner: str, beat: int = 0) -> None:
    lease = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "beat": beat}
    with whole(file) as unfinished:
        unfinished.write_text(json.dumps(lease) + "\n")


def _read(file: epath.Path) -> dict[str, Any]:
    """Reads the lease; returns {} if it is missing or damaged."""
    try:
        lease = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return lease if isinstance(lease, dict) else {}


def _holder(lease: dict[str, Any]) -> str:
    return f" (process {lease.get('pid')} on {lease.get('host')})" if lease else ""
