"""Pictures in .tar archives named as WebDataset names them: KEY.jpg, with KEY.cls for its label.

An archive's headers are read once; its pictures are then read from their places, in any order.
"""

import os
import tarfile
from typing import NamedTuple

from disco_jax.data.decode import Part, suffixes
from disco_jax.data.skips import Skipped

_LABEL = "cls"  # what WebDataset calls the file with the class
_LONGEST = 256  # bytes of a label


class Sample(NamedTuple):
    """A picture of an archive.

    Attributes:
      file: where it lies.
      label: the text of its .cls file; "" without one.
    """

    file: Part
    label: str


def read(root: str, name: str, skipped: Skipped) -> list[Sample]:
    """The pictures of an archive, in its order.

    Args:
      root: the place that `name` is relative to.
      name: of the archive.
      skipped: takes what is not used.
    """
    path = os.path.join(root, name) if name else root
    members = _members(path, name or os.path.basename(path), skipped)
    labels = _labels(path, members)
    with_picture: dict[str, int] = {}  # key -> pictures whose extension is one word
    for member in members.values():
        if member.is_picture and "." not in member.extension:
            with_picture[member.key] = with_picture.get(member.key, 0) + 1
    samples: list[Sample] = []
    shown: set[str] = set()
    for member in members.values():
        if member.extension == _LABEL and member.key in labels:
            continue
        if not member.is_picture or ("." in member.extension and member.key in with_picture):
            skipped.add(f"with suffix .{member.extension or '(none)'}", member.part.name)
        elif member.key in shown and "." not in member.extension:
            skipped.add("further pictures of a sample", member.part.name)
        else:
            shown.add(member.key)
            samples.append(Sample(member.part, labels.get(member.key, "")))
    return samples


class _Member(NamedTuple):
    key: str  # its folders and its name up to the first dot
    extension: str  # what follows, in lower case
    part: Part

    @property
    def is_picture(self) -> bool:
        return f".{self.extension}".endswith(suffixes())


def _members(path: str, shown: str, skipped: Skipped) -> dict[str, _Member]:
    """Name -> file of an archive; of several with one name the last, as `tar` extracts them."""
    found: dict[str, _Member] = {}
    try:
        size = os.stat(path).st_size
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                name = f"{shown}/{info.name}"
                if reason := _unusable(info, size):
                    skipped.add(reason, name)
                elif not info.isdir():
                    if found.pop(info.name, None):
                        skipped.add("duplicate", name)
                    part = Part(path, info.offset_data, info.size, name)
                    found[info.name] = _Member(*_key(info.name), part)
            _check_end(archive)
    except (OSError, tarfile.TarError) as error:
        skipped.add("unreadable", f"{shown} ({error})")
    return found


def _unusable(info: tarfile.TarInfo, size: int) -> str:
    """Why a member of an archive of `size` bytes is not used, or ""."""
    if any(part.startswith(".") for part in info.name.split("/") if part not in ("", ".", "..")):
        return "hidden"
    if info.isdir():
        return ""
    if not info.isreg() or info.issparse():
        return "no file (a link, pipe or device)"
    return "unreadable" if info.offset_data + info.size > size else ""


def _key(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member."""
    folder, base_name = os.path.split(name)
    key, _, extension = base_name.partition(".")
    return os.path.join(folder, key), extension.lower()


def _check_end(archive: tarfile.TarFile) -> None:
    """Raises `tarfile.ReadError` if something else than zeros follows the last member.

    `tarfile` takes a damaged header for the end.
    """
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("a damaged header hides what follows")


def _labels(path: str, members: dict[str, _Member]) -> dict[str, str]:
    """Key -> label, of the .cls files."""
    found = {}
    wanted = [m for m in members.values() if m.extension == _LABEL and m.part.size <= _LONGEST]
    if wanted:
        with open(path, "rb") as archive:
            for member in wanted:
                archive.seek(member.part.offset)
                raw = archive.read(member.part.size)
                found[member.key] = raw.decode("utf-8", "backslashreplace").strip()
    return found
