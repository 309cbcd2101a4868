"""Images in .tar archives in the WebDataset layout: KEY.jpg, with its label in KEY.cls.

The headers of an archive are read once; its images can then be read in any order by offset.
"""

import os
import tarfile
from typing import NamedTuple

from disco_jax.data.decode import Part, suffixes
from disco_jax.data.skips import Skipped

_LABEL = "cls"  # WebDataset's suffix of files with the class
_MAX_LABEL_BYTES = 256


class Sample(NamedTuple):
    """An image in an archive.

    Attributes:
      file: location of the image.
      label: text of its .cls file; "" if there is none.
    """

    file: Part
    label: str


def read(root: str, name: str, skipped: Skipped) -> list[Sample]:
    """Lists the images of an archive in its order.

    Args:
      root: folder that `name` is relative to, or the archive itself if `name` is "".
      name: name of the archive.
      skipped: counts the files that are not used; changed in place.
    """
    path = os.path.join(root, name) if name else root
    members = _members(path, name or os.path.basename(path), skipped)
    labels = _labels(path, members)
    images_per_key: dict[str, int] = {}  # key -> images whose extension has no dot
    for member in members.values():
        if member.is_image and "." not in member.extension:
            images_per_key[member.key] = images_per_key.get(member.key, 0) + 1
    samples: list[Sample] = []
    keys: set[str] = set()
    for member in members.values():
        if member.extension == _LABEL and member.key in labels:
            continue
        if not member.is_image or ("." in member.extension and member.key in images_per_key):
            skipped.add(f"with suffix .{member.extension or '(none)'}", member.part.name)
        elif member.key in keys and "." not in member.extension:
            skipped.add("additional images of a sample", member.part.name)
        else:
            keys.add(member.key)
            samples.append(Sample(member.part, labels.get(member.key, "")))
    return samples


class _Member(NamedTuple):
    key: str  # folders, and the name up to the first dot
    extension: str  # the name after the first dot, in lower case
    part: Part

    @property
    def is_image(self) -> bool:
        return f".{self.extension}".endswith(suffixes())


def _members(path: str, display_name: str, skipped: Skipped) -> dict[str, _Member]:
    """Lists the files of an archive by name; the last one of a name wins, as in `tar`."""
    members: dict[str, _Member] = {}
    try:
        size = os.stat(path).st_size
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                name = f"{display_name}/{info.name}"
                if reason := _unusable(info, size):
                    skipped.add(reason, name)
                elif not info.isdir():
                    if members.pop(info.name, None):
                        skipped.add("duplicate", name)
                    part = Part(path, info.offset_data, info.size, name)
                    members[info.name] = _Member(*_key(info.name), part)
            _check_end(archive)
    except (OSError, tarfile.TarError) as error:
        skipped.add("unreadable", f"{display_name} ({error})")
    return members


def _unusable(info: tarfile.TarInfo, size: int) -> str:
    """Returns the reason to skip a member of an archive of `size` bytes, or ""."""
    if any(part.startswith(".") for part in info.name.split("/") if part not in ("", ".", "..")):
        return "hidden"
    if info.isdir():
        return ""
    if not info.isreg() or info.issparse():
        return "not a regular file (a link, pipe or device)"
    return "unreadable" if info.offset_data + info.size > size else ""


def _key(name: str) -> tuple[str, str]:
    """Splits the name of a member into (key, extension in lower case)."""
    folder, base_name = os.path.split(name)
    key, _, extension = base_name.partition(".")
    return os.path.join(folder, key), extension.lower()


def _check_end(archive: tarfile.TarFile) -> None:
    """Raises `tarfile.ReadError` if the last member is not followed by zeros.

    `tarfile` treats a damaged header as the end of the archive.
    """
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("a damaged header hides the files that follow")


def _labels(path: str, members: dict[str, _Member]) -> dict[str, str]:
    """Reads the .cls files of an archive as key -> label."""
    labels = {}
    label_files = [
        m for m in members.values() if m.extension == _LABEL and m.part.size <= _MAX_LABEL_BYTES
    ]
    if label_files:
        with open(path, "rb") as archive:
            for member in label_files:
                archive.seek(member.part.offset)
                raw = archive.read(member.part.size)
                labels[member.key] = raw.decode("utf-8", "backslashreplace").strip()
    return labels
