"""Reads weights stored in several files that an index lists."""

import json
from collections.abc import Callable, Mapping

import numpy as np
from etils import epath

import disco_jax.convert.safetensors_file as safetensors_file
from disco_jax.convert.archive import Refused, file_bytes, open_file, reported_as_user_errors
from disco_jax.convert.text import listed, shown
from disco_jax.errors import UserError

_INDEX = ".index.json"
# Files of a folder with one network, in search order; libraries vary the part matched by *.
_FOLDER_PATTERNS = (
    f"*.safetensors{_INDEX}",
    "model.safetensors",
    f"*.bin{_INDEX}",
    "pytorch_model.bin",
)


def locate(path: epath.Path) -> epath.Path:
    """Returns the file with weights that a path refers to: an index if there are several files.

    Args:
      path: a file, which is returned, or a folder written by the Hugging Face libraries.

    Returns:
      The file; a folder without such files is returned unchanged.

    Raises:
      UserError: the folder holds several networks.
    """
    if not path.is_dir():
        return path
    for pattern in _FOLDER_PATTERNS:
        candidates = sorted(path.glob(pattern))
        if len(candidates) > 1:
            raise UserError(
                f"{path} holds several networks: give one of the files "
                f"{listed(file.name for file in candidates)}."
            )
        if candidates:
            return candidates[0]
    return path


def is_index(path: epath.Path) -> bool:
    """Returns whether a file is an index of the files that hold the weights."""
    return path.name.endswith(_INDEX)


def files(path: epath.Path) -> list[epath.Path]:
    """Returns the file itself, followed by the files that it lists if it is an index.

    Raises:
      UserError: the index is damaged.
    """
    if not is_index(path):
        return [path]
    return [path, *(path.parent / name for name in sorted(set(_map(path).values())))]


def read(
    path: epath.Path, read_other: Callable[[epath.Path], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns every array that an index lists, under its key.

    Args:
      path: of the index.
      read_other: reads a file that is not a safetensors file.

    Raises:
      UserError: the index or a listed file is damaged or missing, or they list different keys.
    """
    file_of_key = _map(path)
    arrays: dict[str, np.ndarray] = {}
    parts = files(path)[1:]
    if missing := [file.name for file in parts if not file.is_file()]:
        raise UserError(f"{path} lists {listed(missing)}, which its folder does not contain.")
    for file in parts:
        part = safetensors_file.read(file) if file.suffix == ".safetensors" else read_other(file)
        keys = {key for key, name in file_of_key.items() if name == file.name}
        if differing := keys ^ part.keys():
            raise UserError(
                f"{path} and {shown(file.name)} do not match: only one of them has "
                f"{listed(sorted(differing))}."
            )
        arrays.update(part)
    return arrays


def _map(path: epath.Path) -> dict[str, str]:
    """Returns key -> name of the file that holds it."""
    with reported_as_user_errors(path):
        content = json.loads(bytes(file_bytes(open_file(path))))
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise Refused("is damaged or not an index of weights: it has no weight_map.")
        for name in weight_map.values():
            if type(name) is not str or epath.Path(name).name != name:
                raise Refused(f"names a file outside its folder: {shown(name)}.")
        return weight_map
