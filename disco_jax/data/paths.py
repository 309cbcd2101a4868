"""Settings of a data set that follow from its path."""

import glob
import pathlib

from disco_jax import errors


def data_fields(data: str) -> dict[str, str]:
    """Returns the fields of `config.data` for a path.

    The path is a folder of images or .tar archives, a pattern, a list of files, a .tar archive, an
    .npz file or a TFDS version folder.
    """
    path = pathlib.Path(data).expanduser()
    if not path.exists() and glob.has_magic(data):
        return {"source": "folder", "name": "pictures", "dir": str(path)}
    if not path.exists():
        raise errors.UserError(
            f"--data={data} does not exist. Give a folder of images or .tar archives, a file name "
            "pattern, a list of files, a TFDS version folder (with dataset_info.json), or an .npz "
            "file."
        )
    if path.suffix == ".npz":
        return {"source": "npz", "name": path.stem, "dir": str(path), "eval_split": "test"}
    if (path / "dataset_info.json").exists():
        return {"source": "tfds", "name": str(path), "dir": ""}
    name = path.stem if path.is_file() else path.name
    return {"source": "folder", "name": name, "dir": str(path)}
