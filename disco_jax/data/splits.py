"""Recognition of the splits of a data set from folder names or `config.data.splits`.

Ambiguous names raise an error that shows the possible settings.
"""

import os
import re
from collections.abc import Collection, Iterable

from disco_jax.errors import UserError

# Common folder names of splits in lower case.
NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
WHOLE = "."  # in config.data.splits: the whole data set
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_SHOWN = 3  # names in a message


def recognise(name: str) -> str:
    """Returns the split with this folder name, ignoring case; "" if it is not a split."""
    return NAMES.get(name.lower(), "")


def resemble(name: str) -> str:
    """Returns the split that a word of a name denotes, e.g. in "train2017" or "test_set", or ""."""
    matches = {recognise(word) for word in _WORD.findall(name)} - {""}
    return matches.pop() if len(matches) == 1 else ""


def parse(text: str) -> dict[str, str]:
    """Parses `config.data.splits`, e.g. "train=Training set,test=.", to split -> place.

    Raises:
      UserError: the syntax is invalid.
    """
    places: dict[str, str] = {}
    for pair in filter(str.strip, text.split(",")):
        split, equals, place = (part.strip() for part in pair.partition("="))
        if not (split and equals and place) or split in places:
            raise UserError(
                f"config.data.splits={text!r} must name each split once with its folder, e.g. "
                "train=Training,test=Testing."
            )
        places[split] = WHOLE if place == WHOLE else os.path.normpath(place).replace(os.sep, "/")
    return places


def of_folders(where: str, folders: Iterable[str], filled: Collection[str]) -> dict[str, str]:
    """Recognises the splits of a data set by folder names.

    Args:
      where: location of the data set for messages.
      folders: relative paths of all folders of the data set, separated by "/".
      filled: the folders that contain images, directly or in subfolders.

    Returns:
      Split -> its folder, in the order of the folders; {"train": "."} if no folder is a split.

    Raises:
      UserError: the names are ambiguous. The message shows values for `config.data.splits`.
    """
    top = sorted(folder for folder in folders if "/" not in folder)
    exact = {folder: recognise(folder) for folder in top if recognise(folder)}
    for split in dict.fromkeys(exact.values()):
        duplicates = [folder for folder, name in exact.items() if name == split]
        if len(duplicates) > 1:
            raise _ambiguity_error(f"{where} has both {' and '.join(duplicates)}", _places(exact))
    unrecognised = [folder for folder in top if folder in filled and folder not in exact]
    if exact and (len(exact) > 1 or not unrecognised):
        inside = [f for f in filled if f.split("/")[0] in exact]
        _check_below(where, inside)
        return {split: folder for folder, split in exact.items()}
    similar = exact or {folder: resemble(folder) for folder in unrecognised if resemble(folder)}
    if similar:
        remaining = [folder for folder in unrecognised if folder not in similar]
        fact = f"{where} has {_shorten(similar)}" + (
            f" beside {_shorten(remaining)}" if remaining else ""
        )
        raise _ambiguity_error(fact, _places(similar))
    _check_below(where, filled, single=True)
    return {"train": WHOLE}


def check_paths(where: str, folders: Collection[str]) -> None:
    """Checks that files taken for one split do not lie in folders named like several splits.

    Args:
      where: the list or pattern that names the files, for messages.
      folders: relative paths of the folders of the files and of their parents.

    Raises:
      UserError: two sibling folders have names of different splits.
    """
    _check_below(where, folders, top=True)


def of_files(where: str, names: Iterable[str]) -> dict[str, str]:
    """Recognises the splits of archives in one folder by the words in their names.

    Returns:
      Name -> split; "train" for all if no name denotes a split.

    Raises:
      UserError: only some of the names denote a split.
    """
    by_name = {name: resemble(os.path.splitext(os.path.basename(name))[0]) for name in names}
    unrecognised = [name for name, split in by_name.items() if not split]
    if len(unrecognised) == len(by_name):
        return dict.fromkeys(by_name, "train")
    if unrecognised:
        named = {name: split for name, split in by_name.items() if split}
        raise _ambiguity_error(
            f"{where} has {_shorten(named)} beside {_shorten(unrecognised)}", _places(named)
        )
    return by_name


def _check_below(
    where: str, folders: Iterable[str], *, single: bool = False, top: bool = False
) -> None:
    """Raises UserError if folders named like splits would be used as classes or inside a class.

    Args:
      where: location for the message.
      folders: relative paths of the folders with images.
      single: whether one folder with the exact name of a split suffices for the error.
      top: whether to check top-level folders too; set if `where` is not a folder.
    """
    by_parent: dict[str, dict[str, str]] = {}
    for folder in sorted(folders):
        parent, _, name = folder.rpartition("/")
        split = recognise(name) or resemble(name)
        if split and (parent or top):
            by_parent.setdefault(parent, {})[folder] = split
    ambiguous = [
        siblings
        for siblings in by_parent.values()
        if len(set(siblings.values())) > 1
        or (single and any(recognise(folder.rpartition("/")[2]) for folder in siblings))
    ]
    if ambiguous:
        fact = f"{where} has {_shorten(folder for siblings in ambiguous for folder in siblings)}"
        raise _ambiguity_error(
            fact, _places(ambiguous[0]) if len(ambiguous) == 1 and not top else {}
        )


def _places(folders: dict[str, str]) -> dict[str, str]:
    """Returns split -> the first of its folders."""
    return {split: folder for folder, split in reversed(list(folders.items()))}


def _shorten(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _ambiguity_error(fact: str, places: dict[str, str]) -> UserError:
    """Returns the error for ambiguous splits, with the possible settings in one sentence."""
    if places:
        written = ",".join(f"{split}={place}" for split, place in places.items())
        splits = "these are splits" if len(places) > 1 else "this is the split"
        answer = f"set config.data.splits={written!r} if {splits}"
    else:
        answer = "give each split a list of its files if these are splits"
    return UserError(
        f"{fact}: {answer}, or config.data.splits='train={WHOLE}' to train on all of it with "
        "folders as classes."
    )
