"""Walks folders of pictures without opening a file, and says why it leaves something out."""

import os
from collections.abc import Collection, Iterable
from typing import NamedTuple

from disco_jax.data.decode import suffixes
from disco_jax.data.skips import Skipped, printable
from disco_jax.errors import UserError

NO_FILE = "no file (a pipe, device or socket)"
ARCHIVE = ".tar"


class Tree(NamedTuple):
    """What lies below a folder; all names are relative to it, with "/" between folders.

    Attributes:
      real: path of the folder itself.
      pictures: sorted.
      archives: .tar files, sorted.
      folders: name -> real path of every folder that is not hidden, those that links show too.
    """

    real: str
    pictures: list[str]
    archives: list[str]
    folders: dict[str, str]


def walk(root: str, skipped: Skipped, known: Collection[str] = ()) -> Tree:
    """Walks a folder, through links to folders too, but not in circles; opens no file.

    Args:
      root: the folder.
      skipped: takes what is left out.
      known: real paths of files in it that are used for something else, as lists are.

    Raises:
      UserError: the folder itself cannot be read.
    """
    top = os.path.realpath(root)
    pictures: list[str] = []
    archives: list[str] = []
    folders: dict[str, str] = {}
    seen: dict[str, set[str]] = {}  # first folder -> real paths that were walked below it
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        path = os.path.join(root, folder) if folder else root
        real = os.path.realpath(path)
        walked = seen.setdefault(folder.partition("/")[0], {top} if folder else set())
        if real in walked:
            skipped.add("duplicate", f"{folder}/")
            continue
        walked.add(real)
        if folder:
            folders[folder] = real
        try:
            with os.scandir(path) as entries:
                children = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                raise UserError(f"{root} cannot be read: {error.strerror or error}.") from error
            skipped.add("unreadable", f"{folder}/")
            continue
        inside = []
        for child in children:
            name = f"{folder}/{child.name}" if folder else child.name
            kind = _kind(child)
            if kind == "folder":
                inside.append(name)
            elif kind == "picture":
                pictures.append(name)
            elif kind == "archive":
                archives.append(name)
            elif not known or os.path.realpath(child.path) not in known:
                skipped.add(kind, name)
        waiting += reversed(inside)
    return Tree(top, sorted(pictures), sorted(archives), folders)


def pictures(root: str, skipped: Skipped) -> list[str]:
    """The pictures below a folder, relative to it, those directly in it first; each folder once."""
    found = walk(root, skipped)
    for name in found.archives:
        skipped.add(suffix_reason(name), name)
    return sorted(each_once(found, found.pictures, skipped), key=first_folder)


def first_folder(name: str) -> str:
    """The folder that a path begins with; "" for a file directly in the place."""
    first, inside, _ = name.partition("/")
    return first if inside else ""


def _kind(entry: os.DirEntry[str]) -> str:
    """ "folder", "picture", "archive", or why an entry of a folder is left out."""
    if entry.name.startswith("."):
        return "hidden"
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return _kind_of_name(entry.name)
        os.stat(entry.path)  # raises for a link to nothing
        return NO_FILE
    except OSError:
        return "unreadable"


def _kind_of_name(name: str) -> str:
    if name.lower().endswith(suffixes()):
        return "picture"
    return "archive" if name.lower().endswith(ARCHIVE) else suffix_reason(name)


def suffix_reason(name: str) -> str:
    """Why a file whose name does not end as that of a picture is left out."""
    suffix = os.path.splitext(os.path.basename(name))[1].lower()
    return f"with suffix {printable(suffix)}" if suffix else "without a suffix"


def above(names: Iterable[str]) -> set[str]:
    """The folders that hold some files, themselves or further below."""
    found: set[str] = set()
    for name in names:
        while name := name.rpartition("/")[0]:
            if name in found:
                break
            found.add(name)
    return found


def each_once(found: Tree, names: list[str], skipped: Skipped) -> list[str]:
    """The files without those of folders that links show once more."""
    by_real: dict[str, list[str]] = {}
    for folder in sorted({name.rpartition("/")[0] for name in names} - {""}):
        by_real.setdefault(found.folders[folder], []).append(folder)
    again: set[str] = set()
    for real, same in by_real.items():
        itself = [folder for folder in same if os.path.join(found.real, folder) == real]
        again |= set(same) - {(itself or same)[0]}
    for folder in sorted(again):
        skipped.add("duplicate", f"{folder}/")
    return [name for name in names if name.rpartition("/")[0] not in again] if again else names
