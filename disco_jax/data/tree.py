"""Traversal of folders of images without opening files, with a reason for each skipped file."""

import os
from collections.abc import Collection, Iterable
from typing import NamedTuple

from disco_jax.data.decode import suffixes
from disco_jax.data.skips import Skipped, printable
from disco_jax.errors import UserError

NO_FILE = "not a regular file (a pipe, device or socket)"
ARCHIVE = ".tar"


class Tree(NamedTuple):
    """The contents of a folder; all names are relative to it and separated by "/".

    Attributes:
      real: real path of the folder.
      images: sorted names of images.
      archives: sorted names of .tar files.
      folders: name -> real path of every folder that is not hidden, including linked folders.
    """

    real: str
    images: list[str]
    archives: list[str]
    folders: dict[str, str]


def walk(root: str, skipped: Skipped, ignored: Collection[str] = ()) -> Tree:
    """Walks a folder without opening files; follows links to folders but detects cycles.

    Args:
      root: path of the folder.
      skipped: counts the files that are not used; changed in place.
      ignored: real paths of files with another use, e.g. lists, which are not counted as skipped.

    Raises:
      UserError: the folder cannot be read.
    """
    top = os.path.realpath(root)
    images: list[str] = []
    archives: list[str] = []
    folders: dict[str, str] = {}
    walked_below: dict[str, set[str]] = {}  # top-level folder -> real paths visited below it
    stack = [""]
    while stack:
        folder = stack.pop()
        path = os.path.join(root, folder) if folder else root
        real = os.path.realpath(path)
        walked = walked_below.setdefault(folder.partition("/")[0], {top} if folder else set())
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
        subfolders = []
        for child in children:
            name = f"{folder}/{child.name}" if folder else child.name
            kind = _kind(child)
            if kind == "folder":
                subfolders.append(name)
            elif kind == "image":
                images.append(name)
            elif kind == "archive":
                archives.append(name)
            elif not ignored or os.path.realpath(child.path) not in ignored:
                skipped.add(kind, name)
        stack += reversed(subfolders)
    return Tree(top, sorted(images), sorted(archives), folders)


def list_images(root: str, skipped: Skipped) -> list[str]:
    """Lists the images below a folder by relative path, those directly in it first.

    Folders reached more than once through links are listed once.
    """
    contents = walk(root, skipped)
    for name in contents.archives:
        skipped.add(suffix_reason(name), name)
    return sorted(each_once(contents, contents.images, skipped), key=first_folder)


def first_folder(name: str) -> str:
    """Returns the first folder of a relative path; "" for a file without a folder."""
    first, inside, _ = name.partition("/")
    return first if inside else ""


def _kind(entry: os.DirEntry[str]) -> str:
    """Returns "folder", "image", "archive", or the reason to skip an entry of a folder."""
    if entry.name.startswith("."):
        return "hidden"
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return _kind_of_name(entry.name)
        os.stat(entry.path)  # raises for a broken link
        return NO_FILE
    except OSError:
        return "unreadable"


def _kind_of_name(name: str) -> str:
    if name.lower().endswith(suffixes()):
        return "image"
    return "archive" if name.lower().endswith(ARCHIVE) else suffix_reason(name)


def suffix_reason(name: str) -> str:
    """Returns the reason to skip a file without the suffix of an image."""
    suffix = os.path.splitext(os.path.basename(name))[1].lower()
    return f"with suffix {printable(suffix)}" if suffix else "without a suffix"


def above(names: Iterable[str]) -> set[str]:
    """Returns all parent folders of some files."""
    folders: set[str] = set()
    for name in names:
        while name := name.rpartition("/")[0]:
            if name in folders:
                break
            folders.add(name)
    return folders


def each_once(contents: Tree, names: list[str], skipped: Skipped) -> list[str]:
    """Returns the files except those in folders reached a second time through a link."""
    by_real: dict[str, list[str]] = {}
    for folder in sorted({name.rpartition("/")[0] for name in names} - {""}):
        by_real.setdefault(contents.folders[folder], []).append(folder)
    repeated: set[str] = set()
    for real, aliases in by_real.items():
        original = [folder for folder in aliases if os.path.join(contents.real, folder) == real]
        repeated |= set(aliases) - {(original or aliases)[0]}
    for folder in sorted(repeated):
        skipped.add("duplicate", f"{folder}/")
    return (
        [name for name in names if name.rpartition("/")[0] not in repeated] if repeated else names
    )
