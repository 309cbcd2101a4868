"""Write the features of a folder of images, with their file names, to a .npz or .parquet file."""

import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from disco_jax import errors, flags
from disco_jax.arguments import Parser
from disco_jax.data import decode, skips, tree
from disco_jax.data.data_settings import build_views
from disco_jax.data.decode import evaluated
from disco_jax.evaluate import features
from disco_jax.evaluate.open_model import OpenedModel, open_model
from disco_jax.files import whole, write_arrays

_LOG = logging.getLogger(__name__)

SUFFIXES = (".npz", ".parquet")
_THREADS = min(8, os.cpu_count() or 1)


def main(argv: Sequence[str]) -> None:
    """Runs `disco-jax embed CHECKPOINT --images FOLDER --output FILE [--with-head] [--size PX]`."""
    parser = Parser("embed", __doc__)
    parser.add_network()
    parser.add_argument("--images", required=True, help="a folder, searched recursively")
    parser.add_argument("--output", required=True, help="a .npz or .parquet file")
    parser.add_argument("--batch-size", type=int, default=64, help="images per batch")
    values = parser.read(argv)
    if values is not None:
        flags.prepare_jax()
        run(**vars(values))


def run(
    checkpoint: str,
    *,
    images: str,
    output: str,
    with_head: bool = False,
    size: int = 0,
    batch_size: int = 64,
    network: str = "student",
) -> dict[str, Any]:
    """Encodes all images below a folder, resized and cropped as in evaluations.

    Args:
      checkpoint: the directory of a run or an import, or a PyTorch file.
      images: a folder; files whose names end in one of `decode.suffixes` are read.
      output: a .npz file with `files` (relative paths), `features` f32[N, F] and, with `with_head`,
        `embedding` f32[N, D]; or a .parquet file with the same columns (needs pyarrow). Parquet
        text is UTF-8; bytes of other encodings are escaped, e.g. "caf\\xe9.jpg".
      with_head: also write the head's embedding.
      size: side of the images in px; 0 for the run's.
      batch_size: images per batch.
      network: network of a run, "student" or "momentum".

    Returns:
      {"output", "images", "unreadable": names}.

    Raises:
      UserError: there is no readable image, or a setting is invalid.
    """
    target, folder = pathlib.Path(output), pathlib.Path(images)
    _check(target, folder, batch_size, size)
    files = _list_images(images)
    opened = open_model(checkpoint, network)
    unreadable: list[str] = []
    crops = _batches(opened, files, size, batch_size, unreadable)
    extracted = features.extract(
        opened.encoder.with_compute(opened.encoder.compute.for_inference(opened.settings.fast)),
        opened.variables,
        crops,
        build_views(opened.settings.augment, opened.settings.views),
    )
    if not len(extracted.features):
        raise errors.UserError(f"None of the {len(files)} images in {images} can be read.")
    bad = set(unreadable)
    columns = {
        "files": np.array([str(f.relative_to(folder)) for f in files if str(f) not in bad]),
        "features": extracted.features,
    }
    if with_head:
        columns["embedding"] = extracted.embedding
    _write(target, columns)
    for name in unreadable:
        _LOG.warning("%s cannot be read and was skipped.", skips.printable(name))
    width = extracted.features.shape[1]
    print(f"{target}: {width} features of {len(extracted.features)} images from {opened.backbone}.")
    return {"output": str(target), "images": len(extracted.features), "unreadable": unreadable}


def _list_images(images: str) -> list[pathlib.Path]:
    """Lists the images below a folder, and logs which files were skipped.

    Raises:
      UserError: there are none.
    """
    folder, skipped = pathlib.Path(images), skips.Skipped()
    files = [folder / name for name in tree.list_images(str(folder), skipped)]
    for line in skipped.lines():
        _LOG.info("%s: skipped: %s", images, line)
    if not files:
        raise errors.UserError(
            f"--images={images} has no images (file names ending in "
            f"{', '.join(decode.suffixes())})."
        )
    return files


def _check(target: pathlib.Path, folder: pathlib.Path, batch_size: int, size: int) -> None:
    if target.suffix not in SUFFIXES:
        raise errors.UserError(f"--output={target} should end in {' or '.join(SUFFIXES)}.")
    if not target.parent.is_dir():
        raise errors.UserError(f"--output={target}: there is no folder {target.parent}.")
    if not folder.is_dir():
        raise errors.UserError(f"--images={folder} is not a folder.")
    if batch_size < 1:
        raise errors.UserError(f"--batch-size={batch_size} is below 1.")
    if size < 0:
        raise errors.UserError(f"--size={size} is below 0.")
    if target.suffix == ".parquet":
        _pyarrow()


def _batches(
    opened: OpenedModel,
    files: list[pathlib.Path],
    size: int,
    batch_size: int,
    unreadable: list[str],
) -> Iterator[dict[str, np.ndarray]]:
    """Yields full batches of crops in file order, the last one padded.

    Appends the names of unreadable images to `unreadable`.
    """
    data, augment = opened.settings.data, opened.settings.augment
    side = size or augment.size
    resize = data.eval_resize and round(data.eval_resize * side / augment.size)
    devices = jax.local_device_count()
    batch_size = -(-batch_size // devices) * devices

    rules = decode.Rules.parse(data.range, data.max_pixels)

    def read(file: pathlib.Path) -> np.ndarray | None:
        try:
            image = decode.decode(decode.ruled(file, rules))
        except decode.Unreadable:
            return None
        return evaluated(image, side, resize, opened.preprocessing["interpolation"])

    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(files), batch_size):
            names = files[start : start + batch_size]
            crops = np.zeros((batch_size, side, side, 3), np.uint8)
            mask = np.zeros(batch_size, bool)
            for row, crop in enumerate(pool.map(read, names)):
                if crop is None:
                    unreadable.append(str(names[row]))
                else:
                    crops[row], mask[row] = crop, True
            yield {"image": crops, "label": np.full(batch_size, -1, np.int32), "mask": mask}


def _write(target: pathlib.Path, columns: dict[str, np.ndarray]) -> None:
    """Writes the file atomically."""
    with whole(target) as path, path.open("wb") as file:
        if target.suffix == ".npz":
            write_arrays(file, columns)
            return
        arrow, parquet = _pyarrow()
        table = {
            key: arrow.FixedSizeListArray.from_arrays(value.ravel(), value.shape[1])
            if value.ndim == 2
            else arrow.array([skips.utf8(name) for name in value.tolist()])
            for key, value in columns.items()
        }
        parquet.write_table(arrow.table(table), file)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise errors.UserError(
            '.parquet needs pyarrow: pip install "disco-jax[parquet]", or write .npz.'
        ) from None
    return pyarrow, pyarrow.parquet
