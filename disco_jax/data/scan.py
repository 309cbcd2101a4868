"""Lists the images of a folder, a pattern, a list or .tar archives by split and class.

Every file is either used or counted with a reason. An image belongs to one split; its class is the
first folder below the folder of the split, or the class in a list. The reasons to skip a file are:

  with suffix .txt        the suffix is not that of an image format that the installed Pillow reads
  outside the splits      some folders are splits and the file is in none of them
  unreadable              a folder or file without permission, a broken link, a damaged archive
  not a regular file ...  a pipe, device or socket, or a link to one; these are never opened
  duplicate               a folder reached a second time through a link; a repeated line of a list
  hidden                  the name begins with a dot
  missing                 the list names a file that does not exist
"""

import fnmatch
import glob
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from disco_jax.data import lists, shards, splits, tree
from disco_jax.data.decode import Part, suffixes
from disco_jax.data.skips import Skipped, printable
from disco_jax.errors import UserError, did_you_mean

_OUTSIDE = "outside the splits"
_ARCHIVES = {
    ".zip": "a zip archive",
    ".7z": "a 7z archive",
    ".rar": "a rar archive",
    ".tgz": "a compressed .tar",
    ".gz": "a compressed file",
    ".bz2": "a compressed file",
    ".xz": "a compressed file",
    ".zst": "a compressed file",
}


class Entry(NamedTuple):
    """An image of a split.

    Attributes:
      label: class of the image; "" if it has none.
      file: location of the image.
      listed: whether the class comes from a list or archive; it may then be an integer.
    """

    label: str
    file: str | Part
    listed: bool = False

    @property
    def path(self) -> str:
        """Path of the file; for a file in an archive, the archive and the name in it."""
        return self.file.name if isinstance(self.file, Part) else self.file


class Contents(NamedTuple):
    """The contents of a location.

    Attributes:
      root: folder that displayed file names are relative to; "" displays full paths.
      splits: split -> images, sorted by class and name, or in the order of their list or
        archives.
      skipped: all other files.
    """

    root: str
    splits: dict[str, list[Entry]]
    skipped: Skipped


def scan(location: str, given_splits: str = "", labels: str = "") -> Contents:
    """Lists the images of a location by split and class without opening them.

    Args:
      location: a folder, a pattern with *, ? or [...], a list of files, or a .tar archive.
      given_splits: see `config.data.splits`; "" recognises splits by folder names.
      labels: path of a list with the classes of images; "" for none.

    Raises:
      UserError: the location does not exist or has no image, or its splits are ambiguous.
    """
    skipped, explicit = Skipped(), splits.parse(given_splits)
    if os.path.isdir(location):
        by_split = _scan_folder(
            location, explicit, skipped, {os.path.realpath(labels)} if labels else set()
        )
    elif os.path.exists(location):
        by_split = {"train": _scan_file(location, explicit, skipped)}
    elif glob.has_magic(location):
        by_split = {"train": _scan_pattern(location, explicit, skipped)}
    else:
        raise UserError(f"There is no folder {location}; set config.data.dir to an existing one.")
    by_split = {split: entries for split, entries in by_split.items() if entries}
    if not by_split:
        raise _no_images_error(location, skipped)
    if labels:
        by_split = _apply_labels(by_split, labels, skipped)
    return Contents(location if os.path.isdir(location) else "", by_split, skipped)


def _scan_folder(
    root: str, explicit: Mapping[str, str], skipped: Skipped, used_elsewhere: set[str]
) -> dict[str, list[Entry]]:
    """Lists the images of a folder by split, or of its archives if it has no images."""
    listed = {
        split: os.path.join(root, path) for split, path in explicit.items() if lists.is_list(path)
    }
    contents = tree.walk(
        root, skipped, used_elsewhere | {os.path.realpath(path) for path in listed.values()}
    )
    used = contents.images or contents.archives
    if contents.images:
        for name in contents.archives:
            skipped.add(tree.suffix_reason(name), name)
    places = dict(explicit) or splits.of_folders(root, contents.folders, tree.above(used))
    entries_by_split = {
        split: _read_list(path, "config.data.splits", skipped) for split, path in listed.items()
    }
    unlisted = {split: path for split, path in places.items() if split not in entries_by_split}
    _check_places(root, unlisted, contents)
    mapping = _Places(unlisted, contents.folders)
    by_split = _divide(root, used, mapping, entries_by_split, skipped)
    in_archives = bool(used) and not contents.images
    if in_archives and not explicit and places == {"train": splits.WHOLE}:
        by_split = _divide_archives(root, used)
    for split, names in by_split.items():
        unique = tree.each_once(contents, names, skipped)
        if in_archives:
            entries_by_split[split] = list(_read_archives(root, unique, skipped))
        else:
            prefix = os.path.join(root, "")
            labels_and_paths = sorted(
                (mapping.label(split, name), prefix + name) for name in unique
            )
            entries_by_split[split] = [Entry(*row) for row in labels_and_paths]
        if in_archives and not explicit:
            _check_single_split(root, entries_by_split[split])
    return {
        split: entries_by_split[split]
        for split in dict.fromkeys([*places, *entries_by_split])
        if split in entries_by_split
    }


def _divide(
    root: str,
    names: list[str],
    mapping: "_Places",
    listed: Mapping[str, list[Entry]],
    skipped: Skipped,
) -> dict[str, list[str]]:
    """Assigns files to splits by folder; skips files that are in no split and in no list."""
    listed_paths = {os.path.realpath(e.path) for entries in listed.values() for e in entries}
    by_split: dict[str, list[str]] = {split: [] for split in mapping.splits}
    for name in names:
        if split := mapping.split(name):
            by_split[split].append(name)
        elif not listed_paths or os.path.realpath(os.path.join(root, name)) not in listed_paths:
            skipped.add(_OUTSIDE, name)
    return by_split


def _divide_archives(root: str, archives: list[str]) -> dict[str, list[str]]:
    """Assigns archives to splits by their names."""
    by_split: dict[str, list[str]] = {}
    for name, split in splits.of_files(root, archives).items():
        by_split.setdefault(split, []).append(name)
    return by_split


class _Places:
    """Mapping of the files below a folder to splits and classes."""

    def __init__(self, places: Mapping[str, str], all_folders: Collection[str]):
        """Builds the mapping; of nested folders the inner one takes precedence.

        Args:
          places: split -> folder, "." or pattern.
          all_folders: all folders at the location.
        """
        self.splits = list(places)
        folders = {s: f"{p}/" for s, p in places.items() if p in all_folders}
        folders |= {s: "" for s, p in places.items() if p == splits.WHOLE}
        self._patterns = {s: p for s, p in places.items() if s not in folders}
        self._split_of_folder: dict[str, str] = {}
        self._prefixes = dict(sorted(folders.items(), key=lambda pair: -len(pair[1])))

    def split(self, name: str) -> str:
        """Returns the split of a file, or "" if it is in none."""
        for split, pattern in self._patterns.items():
            if fnmatch.fnmatchcase(name, pattern):
                return split
        folder = name.rpartition("/")[0]  # all files of a folder belong to the same split
        if folder not in self._split_of_folder:
            matches = (s for s, start in self._prefixes.items() if name.startswith(start))
            self._split_of_folder[folder] = next(matches, "")
        return self._split_of_folder[folder]

    def label(self, split: str, name: str) -> str:
        """Returns the first folder below that of the split; "" for a file directly in it."""
        if split not in self._prefixes:
            return ""
        return tree.first_folder(name.removeprefix(self._prefixes[split]))


def _check_places(root: str, places: Mapping[str, str], contents: tree.Tree) -> None:
    """Raises UserError for folders of `config.data.splits` that do not exist."""
    for split, location in places.items():
        exists = (
            location == splits.WHOLE
            or location in contents.folders
            or location in contents.archives
        )
        if not (exists or glob.has_magic(location)):
            hint = did_you_mean(location, contents.folders)
            raise UserError(
                f"config.data.splits assigns the folder {location!r} to the split {split!r}, but "
                f"{root} has no such folder.{hint}"
            )


def _check_single_split(location: str, entries: list[Entry]) -> None:
    """Raises UserError if files taken for one split lie in folders named like several splits."""
    splits.check_paths(location, tree.above(_relative_paths([entry.path for entry in entries])))


def _scan_file(location: str, explicit: Mapping[str, str], skipped: Skipped) -> list[Entry]:
    """Lists the images of a list or an archive."""
    if not os.path.isfile(location):
        raise UserError(
            f"{location} is {tree.NO_FILE}; set config.data.dir to a folder, a list or a .tar."
        )
    single_split = _is_single_split(location, explicit)
    if lists.is_list(location):
        entries = _read_list(location, "config.data.dir", skipped)
    elif location.lower().endswith(tree.ARCHIVE):
        entries = list(_read_archives(location, [""], skipped))
    else:
        raise _unsupported_error(location)
    if not single_split:
        _check_single_split(location, entries)
    return entries


def _scan_pattern(pattern: str, explicit: Mapping[str, str], skipped: Skipped) -> list[Entry]:
    """Lists the images that match a pattern, sorted and without classes."""
    matches = sorted(glob.glob(pattern, recursive=True))
    entries = []
    for name in matches:
        if os.path.isdir(name):
            if "**" not in pattern:  # `**` also matches the files in the folder
                skipped.add("folders, but patterns must match files", os.path.join(name, ""))
        elif reason := _skip_reason(name):
            skipped.add(reason, name)
        else:
            entries.append(Entry("", name))
    if not entries:
        raise _no_images_error(pattern, skipped, "matches")
    if not _is_single_split(pattern, explicit):
        _check_single_split(pattern, entries)
    return entries


def _is_single_split(location: str, explicit: Mapping[str, str]) -> bool:
    """Returns whether `config.data.splits` declares all files as one split.

    Raises:
      UserError: the setting has any other value, which is only valid for folders.
    """
    if explicit and dict(explicit) != {"train": splits.WHOLE}:
        raise UserError(
            f"config.data.splits divides a folder, but {location} is not a folder: set it to "
            "'train=.' or ''."
        )
    return bool(explicit)


def _relative_paths(names: list[str]) -> Iterator[str]:
    """Returns paths relative to their common folder."""
    try:
        common = os.path.commonpath([os.path.dirname(name) for name in names])
    except ValueError:  # no paths, or a mix of absolute and relative ones
        common = ""
    return (os.path.relpath(name, common) if common else name for name in names)


def _skip_reason(path: str) -> str:
    """Returns the reason to skip a listed or matched file; "" if it is used."""
    if not path.lower().endswith(suffixes()):
        return tree.suffix_reason(path)
    try:
        return "" if stat.S_ISREG(os.stat(path).st_mode) else tree.NO_FILE
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except (OSError, ValueError):
        return "unreadable"


def _read_list(path: str, setting: str, skipped: Skipped) -> list[Entry]:
    """Reads the images of a list in its order; paths are relative to the folder of the list.

    Raises:
      UserError: the list has two labels for the same file.
    """
    by_file: dict[str, Entry] = {}
    folder = os.path.dirname(path)
    for line in lists.read(path, setting):
        file = os.path.normpath(os.path.join(folder, os.path.expanduser(line.file)))
        if reason := _skip_reason(file):
            skipped.add(reason, line.file)
        elif file not in by_file:
            by_file[file] = Entry(line.label, file, listed=True)
        elif by_file[file].label != line.label:
            raise UserError(
                f"{path} has two labels for {printable(line.file)}, {by_file[file].label!r} and "
                f"{line.label!r}; keep one of the two lines."
            )
        else:
            skipped.add("duplicate", line.file)
    return list(by_file.values())


def _read_archives(root: str, names: Iterable[str], skipped: Skipped) -> Iterator[Entry]:
    """Yields the images of archives in their order."""
    for name in names:
        for sample in shards.read(root, name, skipped):
            yield Entry(sample.label, sample.file, listed=True)


def _apply_labels(
    by_split: dict[str, list[Entry]], labels: str, skipped: Skipped
) -> dict[str, list[Entry]]:
    """Applies the classes of a list to the images it names; other images keep their class.

    If the list names images without a class folder, it applies only to those, because files of a
    training split may have the same names.

    Raises:
      UserError: the list names none of the images, or a name in it matches several images.
    """
    lines = lists.read(labels, "config.data.labels")
    label_of = {os.path.normpath(line.file): line.label for line in lines if line.label}
    by_name: dict[str, list[Entry]] = {}
    all_entries = [entry for entries in by_split.values() for entry in entries]
    for candidates in ([e for e in all_entries if not e.label], all_entries):
        for entry in candidates:
            if name := next(filter(label_of.__contains__, _possible_names(entry.path)), ""):
                by_name.setdefault(name, []).append(entry)
        if by_name:
            break
    else:
        raise UserError(
            f"config.data.labels={labels!r} names none of the images; a line must have a file, "
            f"e.g. {printable(os.path.basename(all_entries[0].path))}, a comma or tab, and its "
            "class."
        )
    for name, entries in by_name.items():
        if len(entries) > 1:
            raise UserError(
                f"config.data.labels={labels!r} names {printable(name)}, which could be "
                f"{' or '.join(printable(e.path) for e in entries[:2])}: write a longer part of "
                "the path."
            )
    for name in sorted(label_of.keys() - by_name.keys()):
        skipped.add("named in config.data.labels but missing", name)
    labelled = {e.path: e._replace(label=label_of[n], listed=True) for n, (e,) in by_name.items()}
    return {s: [labelled.get(e.path, e) for e in entries] for s, entries in by_split.items()}


def _possible_names(path: str) -> Iterator[str]:
    """Yields the names a list may use for an image: its path, each shorter end of it, its stem."""
    yield path
    inside = path.partition("/")[2]
    while inside:
        yield inside
        inside = inside.partition("/")[2]
    yield os.path.splitext(os.path.basename(path))[0]


def _unsupported_error(location: str) -> UserError:
    """Returns the error for a file of an unsupported kind."""
    kinds = f"a folder of images, a list ({', '.join(lists.SUFFIXES)}), a .tar archive or an .npz"
    for suffix, kind in _ARCHIVES.items():
        if location.lower().endswith(suffix):
            return UserError(
                f"{location} is {kind}, which is not supported: unpack it. Supported: {kinds}."
            )
    if location.lower().endswith(suffixes()):
        return UserError(f"{location} is a single image: give its folder. Supported: {kinds}.")
    return UserError(f"{location} is a file of another kind. Supported: {kinds}.")


def _no_images_error(location: str, skipped: Skipped, verb: str = "has") -> UserError:
    skipped_lines = "; ".join(skipped.lines()[:3])
    return UserError(
        f"{location} {verb} no images (file names that end in {', '.join(suffixes())})."
        + (f" Skipped: {skipped_lines}." if skipped_lines else "")
    )
