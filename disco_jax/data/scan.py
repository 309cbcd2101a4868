"""What a folder, a pattern, a list or .tar archives hold: every file is used, or counted with why.

One rule for all places. A picture is used for one split; its class is the first folder below the
folder of the split, or what a list says. Anything else is left out for one of these reasons:

  with suffix .txt    the name does not end as that of a picture that Pillow here reads
  beside the splits   in a place where some folders are splits, all that is in none of them
  unreadable          a folder or file that may not be read; a link to nothing; a damaged archive
  no file ...         a pipe, device or socket, or a link to one: they are never opened
  duplicate           a folder that a link shows a second time; a path that a list repeats
  hidden              the name begins with a dot
  missing             named in a list and not there
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

_BESIDE = "beside the splits"
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
    """A picture that is used.

    Attributes:
      label: its class; "" if it has none.
      file: where it lies.
      listed: whether a list or archive gives the class, which may then be a number.
    """

    label: str
    file: str | Part
    listed: bool = False

    @property
    def path(self) -> str:
        """Of the file; for a part of an archive, the archive and the name in it."""
        return self.file.name if isinstance(self.file, Part) else self.file


class Contents(NamedTuple):
    """What a place holds.

    Attributes:
      root: what names of files are shown relative to; "": they are shown whole.
      splits: split -> its pictures, sorted by class and name, or in the order of their list or
        archives.
      skipped: everything else.
    """

    root: str
    splits: dict[str, list[Entry]]
    skipped: Skipped


def scan(place: str, given_splits: str = "", labels: str = "") -> Contents:
    """Lists the pictures of a place by split and class; opens none.

    Args:
      place: a folder, a pattern with *, ? or [...], a list of files, or a .tar archive.
      given_splits: see `config.data.splits`; "": found by the names of folders.
      labels: a list with the classes of pictures; "": none.

    Raises:
      UserError: there is no such place, no picture in it, or no plain answer to what its splits
        are.
    """
    skipped, by_hand = Skipped(), splits.parse(given_splits)
    if os.path.isdir(place):
        found = _of_folder(place, by_hand, skipped, {os.path.realpath(labels)} if labels else set())
    elif os.path.exists(place):
        found = {"train": _of_file(place, by_hand, skipped)}
    elif glob.has_magic(place):
        found = {"train": _of_pattern(place, by_hand, skipped)}
    else:
        raise UserError(f"There is no folder {place}; config.data.dir names the one to read.")
    found = {split: entries for split, entries in found.items() if entries}
    if not found:
        raise _no_pictures(place, skipped)
    if labels:
        found = _labelled(found, labels, skipped)
    return Contents(place if os.path.isdir(place) else "", found, skipped)


def _of_folder(
    root: str, by_hand: Mapping[str, str], skipped: Skipped, known: set[str]
) -> dict[str, list[Entry]]:
    """Split -> pictures of a folder, or of the archives in it where there are no pictures."""
    listed = {s: os.path.join(root, p) for s, p in by_hand.items() if lists.is_list(p)}
    found = tree.walk(root, skipped, known | {os.path.realpath(path) for path in listed.values()})
    used = found.pictures or found.archives
    if found.pictures:
        for name in found.archives:
            skipped.add(tree.suffix_reason(name), name)
    places = dict(by_hand) or splits.of_folders(root, found.folders, tree.above(used))
    made = {s: _of_list(path, "config.data.splits", skipped) for s, path in listed.items()}
    _check_places(root, {s: p for s, p in places.items() if s not in made}, found)
    of_place = _Places({s: p for s, p in places.items() if s not in made}, found.folders)
    by_split = _divided(root, used, of_place, made, skipped)
    in_archives = bool(used) and not found.pictures
    if in_archives and not by_hand and places == {"train": splits.WHOLE}:
        by_split = _by_name(root, used)
    for split, names in by_split.items():
        once = tree.each_once(found, names, skipped)
        if in_archives:
            made[split] = list(_of_archives(root, once, skipped))
        else:
            start = os.path.join(root, "")
            rows = sorted((of_place.label(split, name), start + name) for name in once)
            made[split] = [Entry(*row) for row in rows]
        if in_archives and not by_hand:
            _check_inside(root, made[split])
    return {split: made[split] for split in dict.fromkeys([*places, *made]) if split in made}


def _divided(
    root: str,
    names: list[str],
    of_place: "_Places",
    listed: Mapping[str, list[Entry]],
    skipped: Skipped,
) -> dict[str, list[str]]:
    """Split -> files in the folders of the splits; counts those that are in none, or in a list."""
    of_lists = {os.path.realpath(e.path) for entries in listed.values() for e in entries}
    by_split: dict[str, list[str]] = {split: [] for split in of_place.splits}
    for name in names:
        if split := of_place.split(name):
            by_split[split].append(name)
        elif not of_lists or os.path.realpath(os.path.join(root, name)) not in of_lists:
            skipped.add(_BESIDE, name)
    return by_split


def _by_name(root: str, archives: list[str]) -> dict[str, list[str]]:
    """Split -> archives, by their names."""
    by_split: dict[str, list[str]] = {}
    for name, split in splits.of_files(root, archives).items():
        by_split.setdefault(split, []).append(name)
    return by_split


class _Places:
    """Which split and class a file below a folder belongs to."""

    def __init__(self, places: Mapping[str, str], known: Collection[str]):
        """Of folders within one another the inner one wins.

        Args:
          places: split -> folder, "." or pattern.
          known: all folders.
        """
        self.splits = list(places)
        folders = {s: f"{p}/" for s, p in places.items() if p in known}
        folders |= {s: "" for s, p in places.items() if p == splits.WHOLE}
        self._patterns = {s: p for s, p in places.items() if s not in folders}
        self._of_folder: dict[str, str] = {}
        self._prefixes = dict(sorted(folders.items(), key=lambda pair: -len(pair[1])))

    def split(self, name: str) -> str:
        """ "" if none has the file."""
        for split, pattern in self._patterns.items():
            if fnmatch.fnmatchcase(name, pattern):
                return split
        folder = name.rpartition("/")[0]  # whose files are all in one split
        if folder not in self._of_folder:
            of = (s for s, start in self._prefixes.items() if name.startswith(start))
            self._of_folder[folder] = next(of, "")
        return self._of_folder[folder]

    def label(self, split: str, name: str) -> str:
        """The first folder below that of the split; "" for a file directly in it."""
        if split not in self._prefixes:
            return ""
        return tree.first_folder(name.removeprefix(self._prefixes[split]))


def _check_places(root: str, places: Mapping[str, str], found: tree.Tree) -> None:
    """Refuses folders of `config.data.splits` that are not there."""
    for split, place in places.items():
        known = place == splits.WHOLE or place in found.folders or place in found.archives
        if not (known or glob.has_magic(place)):
            hint = did_you_mean(place, found.folders)
            raise UserError(
                f"config.data.splits gives the split {split!r} the folder {place!r}, which "
                f"{root} does not have.{hint}"
            )


def _check_inside(place: str, entries: list[Entry]) -> None:
    """Asks about files of one split that lie in folders of several."""
    splits.check_paths(place, tree.above(_relative([entry.path for entry in entries])))


def _of_file(place: str, by_hand: Mapping[str, str], skipped: Skipped) -> list[Entry]:
    """The pictures of a list or an archive."""
    if not os.path.isfile(place):
        raise UserError(
            f"{place} is {tree.NO_FILE}; config.data.dir names a folder, a list or a .tar."
        )
    whole = _is_whole(place, by_hand)
    if lists.is_list(place):
        entries = _of_list(place, "config.data.dir", skipped)
    elif place.lower().endswith(tree.ARCHIVE):
        entries = list(_of_archives(place, [""], skipped))
    else:
        raise _refused(place)
    if not whole:
        _check_inside(place, entries)
    return entries


def _of_pattern(pattern: str, by_hand: Mapping[str, str], skipped: Skipped) -> list[Entry]:
    """Every picture that a pattern matches, sorted, without a class."""
    matches = sorted(glob.glob(pattern, recursive=True))
    entries = []
    for name in matches:
        if os.path.isdir(name):
            if "**" not in pattern:  # which matches what is in it, too
                skipped.add("folders, where a pattern is one of files", os.path.join(name, ""))
        elif reason := _reason_of(name):
            skipped.add(reason, name)
        else:
            entries.append(Entry("", name))
    if not entries:
        raise _no_pictures(pattern, skipped, "matches")
    if not _is_whole(pattern, by_hand):
        _check_inside(pattern, entries)
    return entries


def _is_whole(place: str, by_hand: Mapping[str, str]) -> bool:
    """Whether `config.data.splits` says that all files are one split; it can say nothing else."""
    if by_hand and dict(by_hand) != {"train": splits.WHOLE}:
        raise UserError(
            f"config.data.splits divides a folder; {place} is none: set it to 'train=.' or ''."
        )
    return bool(by_hand)


def _relative(names: list[str]) -> Iterator[str]:
    """Paths without what all have in common."""
    try:
        common = os.path.commonpath([os.path.dirname(name) for name in names])
    except ValueError:  # there are none, or some are absolute and some not
        common = ""
    return (os.path.relpath(name, common) if common else name for name in names)


def _reason_of(path: str) -> str:
    """Why a file that was named is not used; "" if it is."""
    if not path.lower().endswith(suffixes()):
        return tree.suffix_reason(path)
    try:
        return "" if stat.S_ISREG(os.stat(path).st_mode) else tree.NO_FILE
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except (OSError, ValueError):
        return "unreadable"


def _of_list(path: str, setting: str, skipped: Skipped) -> list[Entry]:
    """The pictures of a list, in its order; paths are relative to the folder of the list.

    Raises:
      UserError: it gives one file two labels.
    """
    known: dict[str, Entry] = {}
    folder = os.path.dirname(path)
    for line in lists.read(path, setting):
        file = os.path.normpath(os.path.join(folder, os.path.expanduser(line.file)))
        if reason := _reason_of(file):
            skipped.add(reason, line.file)
        elif file not in known:
            known[file] = Entry(line.label, file, listed=True)
        elif known[file].label != line.label:
            raise UserError(
                f"{path} gives {printable(line.file)} the labels {known[file].label!r} and "
                f"{line.label!r}; keep one of the two lines."
            )
        else:
            skipped.add("duplicate", line.file)
    return list(known.values())


def _of_archives(root: str, names: Iterable[str], skipped: Skipped) -> Iterator[Entry]:
    """The pictures of archives, in their order."""
    for name in names:
        for sample in shards.read(root, name, skipped):
            yield Entry(sample.label, sample.file, listed=True)


def _labelled(
    found: dict[str, list[Entry]], labels: str, skipped: Skipped
) -> dict[str, list[Entry]]:
    """The pictures with the classes that a list gives them; others keep theirs.

    Where some that are named have no class by their folder, the list is of these alone: in a
    training split other files may bear the same names.

    Raises:
      UserError: the list names none of the pictures, or a name in it is that of several.
    """
    lines = lists.read(labels, "config.data.labels")
    given = {os.path.normpath(line.file): line.label for line in lines if line.label}
    named: dict[str, list[Entry]] = {}
    everything = [entry for entries in found.values() for entry in entries]
    for some in ([e for e in everything if not e.label], everything):
        for entry in some:
            if name := next(filter(given.__contains__, _names(entry.path)), ""):
                named.setdefault(name, []).append(entry)
        if named:
            break
    else:
        raise UserError(
            f"config.data.labels={labels!r} names none of the pictures; a line has a file, as "
            f"{printable(os.path.basename(everything[0].path))}, a comma or tab, and its "
            "class."
        )
    for name, entries in named.items():
        if len(entries) > 1:
            raise UserError(
                f"config.data.labels={labels!r} names {printable(name)}, which could be "
                f"{' or '.join(printable(e.path) for e in entries[:2])}: write more of the "
                "path."
            )
    for name in sorted(given.keys() - named.keys()):
        skipped.add("named in config.data.labels and not there", name)
    labelled = {e.path: e._replace(label=given[n], listed=True) for n, (e,) in named.items()}
    return {s: [labelled.get(e.path, e) for e in entries] for s, entries in found.items()}


def _names(path: str) -> Iterator[str]:
    """What a list may call a picture: from its whole path to its name without the suffix."""
    yield path
    inside = path.partition("/")[2]
    while inside:
        yield inside
        inside = inside.partition("/")[2]
    yield os.path.splitext(os.path.basename(path))[0]


def _refused(place: str) -> UserError:
    """The error for a file that is none of what is read, with what it is."""
    kinds = f"a folder of pictures, a list ({', '.join(lists.SUFFIXES)}), a .tar archive or an .npz"
    for suffix, what in _ARCHIVES.items():
        if place.lower().endswith(suffix):
            return UserError(f"{place} is {what}, which is not read: unpack it. Data are {kinds}.")
    if place.lower().endswith(suffixes()):
        return UserError(f"{place} is one picture: give its folder. Data are {kinds}.")
    return UserError(f"{place} is a file of another kind. Data are {kinds}.")


def _no_pictures(place: str, skipped: Skipped, has: str = "has") -> UserError:
    there = "; ".join(skipped.lines()[:3])
    return UserError(
        f"{place} {has} no pictures (names that end in {', '.join(suffixes())})."
        + (f" There: {there}." if there else "")
    )
