"""Weights that lie in several files, of which an index lists what is where."""

import json
from collections.abc import Callable, Mapping

import numpy as np
from etils import epath

import disco_jax.convert.safetensors_file as safetensors_file
from disco_jax.convert.archive import Refused, opened, told_of, view
from disco_jax.convert.text import listed, shown
from disco_jax.errors import UserError

_INDEX = ".index.json"
# Files of a folder that holds one network, the first that is there; * is what libraries vary.
_OF_FOLDERS = (
    f"*.safetensors{_INDEX}",
    "model.safetensors",
    f"*.bin{_INDEX}",
    "pytorch_model.bin",
)


def locate(path: epath.Path) -> epath.Path:
    """The file with weights that a path names, an index where they lie in several.

    Args:
      path: a file, which is returned, or a folder as the Hugging Face libraries write it.

    Returns:
      The file; a folder without such files as it is.

    Raises:
      UserError: the folder holds several networks.
    """
    if not path.is_dir():
        return path
    for pattern in _OF_FOLDERS:
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            raise UserError(
                f"{path} holds several networks: give one of the files "
                f"{listed(file.name for file in found)}."
            )
        if found:
            return found[0]
    return path


def is_index(path: epath.Path) -> bool:
    """Whether a file lists the files that hold the weights."""
    return path.name.endswith(_INDEX)


def files(path: epath.Path) -> list[epath.Path]:
    """The file, and of an index the files that it lists.

    Raises:
      UserError: the index is damaged.
    """
    if not is_index(path):
        return [path]
    return [path, *(path.parent / name for name in sorted(set(_map(path).values())))]


def read(
    path: epath.Path, other: Callable[[epath.Path], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Every array that an index lists, under its key.

    Args:
      path: of the index.
      other: reads a file that is no safetensors file.

    Raises:
      UserError: the index or a file that it lists is damaged or missing, or they do not fit.
    """
    wanted = _map(path)
    arrays: dict[str, np.ndarray] = {}
    parts = files(path)[1:]
    if missing := [file.name for file in parts if not file.is_file()]:
        raise UserError(f"{path} lists {listed(missing)}, which its folder does not hold.")
    for file in parts:
        held = safetensors_file.read(file) if file.suffix == ".safetensors" else other(file)
        names = {key for key, name in wanted.items() if name == file.name}
        if differing := names ^ held.keys():
            raise UserError(
                f"{path} and {shown(file.name)} do not fit: only one of them has "
                f"{listed(sorted(differing))}."
            )
        arrays.update(held)
    return arrays


def _map(path: epath.Path) -> dict[str, str]:
    """Key -> name of the file that holds it."""
    with told_of(path):
        content = json.loads(bytes(view(opened(path))))
        found = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(found, dict) or not found:
            raise Refused("is damaged or no index of weights: it has no weight_map.")
        for name in found.values():
            if type(name) is not str or epath.Path(name).name != name:
                raise Refused(f"names a file outside of its folder: {shown(name)}.")
        return found
