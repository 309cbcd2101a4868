"""Which folders of a data set are its splits: by their names, by hand, or by a question."""

import os
import re
from collections.abc import Collection, Iterable

from disco_jax.errors import UserError

# What people call the folder of a split, in lower case.
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
WHOLE = "."  # in config.data.splits: the place itself
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_SHOWN = 3  # names in a question


def recognise(name: str) -> str:
    """The split that a folder of this name is, whatever its case; "" if it is none."""
    return NAMES.get(name.lower(), "")


def resemble(name: str) -> str:
    """The split of which one word of a name speaks, as in "train2017" and "test_set", or ""."""
    found = {recognise(word) for word in _WORD.findall(name)} - {""}
    return found.pop() if len(found) == 1 else ""


def parse(given: str) -> dict[str, str]:
    """`config.data.splits` as split -> place: "train=Training set,test=." and so on.

    Raises:
      UserError: it is written in another way.
    """
    places: dict[str, str] = {}
    for pair in filter(str.strip, given.split(",")):
        split, equals, place = (part.strip() for part in pair.partition("="))
        if not (split and equals and place) or split in places:
            raise UserError(
                f"config.data.splits={given!r} must name each split once with its folder, as in "
                "train=Training,test=Testing."
            )
        places[split] = WHOLE if place == WHOLE else os.path.normpath(place).replace(os.sep, "/")
    return places


def of_folders(where: str, folders: Iterable[str], filled: Collection[str]) -> dict[str, str]:
    """Finds the splits of a data set.

    Args:
      where: the place, for messages.
      folders: all folders below it, relative, with "/" between names.
      filled: those of them that hold pictures, themselves or further below.

    Returns:
      Split -> its folder, in the order of the folders; {"train": "."} if none looks like a split.

    Raises:
      UserError: the names allow more than one answer; it asks for `config.data.splits`.
    """
    top = sorted(folder for folder in folders if "/" not in folder)
    exact = {folder: recognise(folder) for folder in top if recognise(folder)}
    for split in dict.fromkeys(exact.values()):
        same = [folder for folder, of in exact.items() if of == split]
        if len(same) > 1:
            raise _question(f"{where} has both {' and '.join(same)}", _places(exact))
    others = [folder for folder in top if folder in filled and folder not in exact]
    if exact and (len(exact) > 1 or not others):
        inside = [f for f in filled if f.split("/")[0] in exact]
        _check_below(where, inside)
        return {split: folder for folder, split in exact.items()}
    alike = exact or {folder: resemble(folder) for folder in others if resemble(folder)}
    if alike:
        beside = [folder for folder in others if folder not in alike]
        fact = f"{where} has {_few(alike)}" + (f" beside {_few(beside)}" if beside else "")
        raise _question(fact, _places(alike))
    _check_below(where, filled, single=True)
    return {"train": WHOLE}


def check_paths(where: str, folders: Collection[str]) -> None:
    """Asks if files that are all taken for one split lie in folders of several.

    Args:
      where: the list or pattern that names the files, for messages.
      folders: in which they lie, relative to one place, and the folders above those.

    Raises:
      UserError: two folders beside one another have names of different splits.
    """
    _check_below(where, folders, top=True)


def of_files(where: str, names: Iterable[str]) -> dict[str, str]:
    """Name -> split of archives in one folder, by the words in their names.

    Raises:
      UserError: only some of them name a split.
    """
    found = {name: resemble(os.path.splitext(os.path.basename(name))[0]) for name in names}
    unknown = [name for name, split in found.items() if not split]
    if len(unknown) == len(found):
        return dict.fromkeys(found, "train")
    if unknown:
        named = {name: split for name, split in found.items() if split}
        raise _question(f"{where} has {_few(named)} beside {_few(unknown)}", _places(named))
    return found


def _check_below(
    where: str, folders: Iterable[str], *, single: bool = False, top: bool = False
) -> None:
    """Asks about folders of splits that would become classes, or parts of a class.

    Args:
      where: the place, for the message.
      folders: that are used.
      single: one folder with the very name of a split is asked about, too.
      top: so are folders directly in the place, which is no folder itself.
    """
    by_parent: dict[str, dict[str, str]] = {}
    for folder in sorted(folders):
        parent, _, name = folder.rpartition("/")
        split = recognise(name) or resemble(name)
        if split and (parent or top):
            by_parent.setdefault(parent, {})[folder] = split
    asked = [
        found
        for found in by_parent.values()
        if len(set(found.values())) > 1
        or (single and any(recognise(folder.rpartition("/")[2]) for folder in found))
    ]
    if asked:
        fact = f"{where} has {_few(folder for found in asked for folder in found)}"
        raise _question(fact, _places(asked[0]) if len(asked) == 1 and not top else {})


def _places(folders: dict[str, str]) -> dict[str, str]:
    """Split -> the first of its folders."""
    return {split: folder for folder, split in reversed(list(folders.items()))}


def _few(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _question(fact: str, places: dict[str, str]) -> UserError:
    """One sentence with the answers to choose from."""
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
