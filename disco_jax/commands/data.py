"""Check a data set before a run: counts, classes, sizes, skipped files and reading speed."""

import collections
import itertools
import json
import logging
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from disco_jax import errors, typed
from disco_jax.arguments import Parser
from disco_jax.configs import common
from disco_jax.data import darkness, decode, paths, pipeline, views
from disco_jax.data.contract import Position, Source
from disco_jax.data.data_settings import DataSettings
from disco_jax.data.skips import Skipped, printable
from disco_jax.files import whole, write_arrays

_LOG = logging.getLogger(__name__)

# Lower bounds of the bins in the histogram of shorter sides, in px.
SIDES = (1, 32, 64, 128, 224, 384, 768, 1536)
_THREADS = os.cpu_count() or 1
_SHOWN = 10


def main(argv: Sequence[str]) -> None:
    """Runs `disco-jax data DATA [--data-dir DIR] [--limit N] [--seconds S] [--output FILE]`."""
    parser = Parser("data", __doc__)
    parser.add_argument(
        "data",
        help="a folder, pattern or list of images, a folder of .tar archives, an .npz file, a TFDS "
        "name or version folder",
    )
    parser.add_argument("--data-dir", default="", help="directory of prepared TFDS data sets")
    parser.add_argument(
        "--limit", type=int, default=0, help="number of images to read per split; 0 reads all"
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="duration of the speed measurement; 0 skips it"
    )
    parser.add_argument("--output", default="", help="a .json file to write the report to")
    parser.add_argument(
        "--npz", default="", help="an .npz file to copy the images to, readable without TensorFlow"
    )
    parser.add_argument(
        "--splits", default="", help="value for config.data.splits: train=FOLDER,..."
    )
    parser.add_argument(
        "--labels", default="", help="value for config.data.labels: a list with classes"
    )
    parser.add_argument(
        "--subset", default="", help="value for config.data.subset: a list of training images"
    )
    parser.add_argument(
        "--range",
        default="full",
        dest="values",
        help="value for config.data.range: full, image or LOW,HIGH",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=decode.MAX_PIXELS,
        help="value for config.data.max_pixels",
    )
    values = parser.read(argv)
    if values is not None:
        run(**vars(values))


def run(
    data: str,
    *,
    data_dir: str = "",
    limit: int = 0,
    seconds: float = 5.0,
    output: str = "",
    npz: str = "",
    splits: str = "",
    labels: str = "",
    subset: str = "",
    values: str = "full",
    max_pixels: int = decode.MAX_PIXELS,
) -> dict[str, Any]:
    """Reads and decodes every image once, then measures the speed of the input pipeline.

    Args:
      data: a folder, pattern or list of images, a folder of .tar archives, an .npz file, or the
        name or version folder of a prepared TFDS data set.
      data_dir: directory of prepared TFDS data sets; "" is $TFDS_DATA_DIR or
        ~/tensorflow_datasets.
      limit: number of images to read per split; 0 reads all.
      seconds: duration of the speed measurement with two 224 px crops per image; 0 skips it.
      output: a .json file to write the returned report to.
      npz: an .npz file to copy the images to, for `config.data.source=npz`; they must have one
        size.
      splits, labels, subset, max_pixels: fields of `config.data`.
      values: value of `config.data.range`.

    Returns:
      {"name", "classes", "splits": {split: {"images", "read", "labelled", "classes_seen",
      "per_class", "sides", "unreadable"}}, "class_names", "not_used": {reason: {"count",
      "names"}}, "brightest": highest pixel value of the images read, "images_per_s"}.

    Raises:
      UserError: the data set does not exist or has no images. For ImageNet, the message says
        which files to place where.
    """
    _check(output, npz, limit, seconds)
    fields = dict(splits=splits, labels=labels, subset=subset, range=values, max_pixels=max_pixels)
    source = _open(data, data_dir, fields)
    splits_report = {split: _inspect(source, split, limit) for split in source.splits}
    brightest = [split_report.pop("brightest") for split_report in splits_report.values()]
    report = {
        "name": source.name,
        "classes": source.num_classes,
        "class_names": [printable(name) for name in source.class_names],
        "splits": splits_report,
        "not_used": source.skipped.as_dict(),
        "brightest": max((level for level in brightest if level is not None), default=None),
        "images_per_s": _speed(source, splits_report, seconds) if seconds else None,
    }
    _print(report, source.skipped)
    if output:
        with whole(output) as path:
            path.write_text(json.dumps(report, indent=2) + "\n")
    if npz:
        _copy(source, npz, limit)
    return report


def _check(output: str, npz: str, limit: int, seconds: float) -> None:
    if output and pathlib.Path(output).suffix != ".json":
        raise errors.UserError(f"--output={output} should end in .json.")
    if npz and pathlib.Path(npz).suffix != ".npz":
        raise errors.UserError(f"--npz={npz} should end in .npz.")
    if limit < 0 or seconds < 0:
        raise errors.UserError(f"--limit={limit} and --seconds={seconds} must not be below 0.")


def _copy(source: Source, npz: str, limit: int) -> None:
    """Writes the first `limit` images of every split, or all if it is 0, to an .npz file."""
    arrays = {}
    for split in source.splits:
        images, labels = [], []
        for name, image, label in itertools.islice(source.iter_images(split), limit or None):
            try:
                images.append(image if isinstance(image, np.ndarray) else decode.decode(image))
            except decode.Unreadable as error:
                raise errors.UserError(f"--npz={npz}: {name} is unreadable ({error}).") from error
            if images[-1].shape != images[0].shape:
                raise errors.UserError(
                    f"--npz={npz} needs images of one size; those of {split} have "
                    f"{images[0].shape} and {images[-1].shape} ({name}). Leave them in files: "
                    "config.data.source=folder."
                )
            labels.append(label)
        if not images:
            continue
        stacked = np.stack(images)
        grey = stacked.ndim == 4 and (stacked == stacked[..., :1]).all()
        arrays[f"{split}_images"] = stacked[..., :1] if grey else stacked
        if min(labels) >= 0:
            arrays[f"{split}_labels"] = np.array(labels, np.int32)
    with whole(npz) as path, open(path, "wb") as file:
        write_arrays(file, arrays, compress=True)
    print(f"Copied to {npz}: --config.data.source=npz --config.data.dir={npz}")


def _open(data: str, data_dir: str, fields: dict[str, Any]) -> Source:
    """Opens the source that a run with this data and these fields of `config.data` would use."""
    config = common.pretrain().data
    path = pathlib.Path(data).expanduser()
    if path.exists() or any(mark in data for mark in "*?["):
        config.update(paths.data_fields(data))
    else:
        config.update(source="tfds", name=data, dir=data_dir)
    config.update(max_unreadable=2**31, **fields)
    settings = typed.parse(DataSettings, config, "config.data")
    return pipeline.open_source(settings, shared=False, tell=False)


def _inspect(source: Source, split: str, limit: int) -> dict[str, Any]:
    """Reads one split and returns its entry of the report."""
    sides: collections.Counter[int] = collections.Counter()
    labels: collections.Counter[int] = collections.Counter()
    unreadable, read, last_log = [], 0, time.monotonic()
    brightest: int | None = None
    records = source.iter_images(split)
    for name, label, size_and_brightness in _decoded(itertools.islice(records, limit or None)):
        read += 1
        labels[label] += 1
        if size_and_brightness is None:
            unreadable.append(name)
        else:
            shape, highest = size_and_brightness
            brightest = max(highest, brightest or 0)
            sides[max(side for side in SIDES if side <= min(shape))] += 1
        if time.monotonic() - last_log > 10:
            last_log = time.monotonic()
            _LOG.info("%s: %d of %d read", split, read, source.count(split))
    counts = [count for label, count in labels.items() if label >= 0]
    return {
        "images": source.count(split),
        "read": read,
        "labelled": sum(counts),
        "classes_seen": len(counts),
        "per_class": [min(counts), max(counts)] if counts else None,
        "sides": {str(side): sides[side] for side in SIDES if sides[side]},
        "unreadable": unreadable,
        "brightest": brightest,
    }


def _decoded(records: Iterator[tuple[str, Any, int]]) -> Iterator[tuple[str, int, Any]]:
    """Decodes records in threads; yields (name, label, properties) of each.

    The properties are ((height, width), highest pixel value), or None for an unreadable image.
    """

    def size_and_brightness(record: tuple[str, Any, int]) -> Any:
        _, image, _ = record
        try:
            pixels = image if isinstance(image, np.ndarray) else decode.decode(image)
        except decode.Unreadable:
            return None
        return pixels.shape[:2], int(pixels.max())

    with ThreadPoolExecutor(_THREADS) as pool:
        while chunk := list(itertools.islice(records, 16 * _THREADS)):
            for (name, _, label), properties in zip(
                chunk, pool.map(size_and_brightness, chunk), strict=True
            ):
                yield name, label, properties


def _speed(source: Source, splits: dict[str, Any], seconds: float) -> float | None:
    """Measures images per second with two 224 px crops each; None if no image is readable."""
    split = "train" if "train" in splits else next(iter(splits))
    readable = source.count(split) - len(splits[split]["unreadable"])
    batch = max(1, min(64, readable // 2))
    recipe = views.build(common.pretrain().augment)
    batches = source.train(split, dict(enumerate(recipe.crops)), batch, 0, Position.start(), 2**31)
    try:
        next(batches)
    except errors.UserError:
        return None  # no image is readable
    start, count = time.monotonic(), 0
    while (spent := time.monotonic() - start) < seconds:
        count += len(next(batches).views[0])
    return count / spent


def _print(report: dict[str, Any], skipped: Skipped) -> None:
    """Prints the report."""
    classes = f"{report['classes']} classes" if report["classes"] else "no labels"
    names = report["class_names"]
    if names:
        classes += f" ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
    print(f"{report['name']}: {classes}")
    for split, split_report in report["splits"].items():
        unreadable = split_report["unreadable"]
        line = f"  {split}: {split_report['images']:,} images"
        if split_report["read"] < split_report["images"]:
            line += f", {split_report['read']:,} read"
        if split_report["per_class"]:
            least, most = split_report["per_class"]
            line += f", {least} to {most} in each of {split_report['classes_seen']} classes"
        print(line + f", {len(unreadable)} unreadable")
        bounds = (*SIDES[1:], 0)
        for side, above in zip(SIDES, bounds, strict=True):
            if count := split_report["sides"].get(str(side)):
                span = f"{side} to {above - 1}" if above else f"{side} and more"
                print(f"    shorter side {span:>12} px: {count:,}")
        for name in unreadable[:_SHOWN]:
            print(f"    unreadable: {name}")
        if len(unreadable) > _SHOWN:
            print(f"    and {len(unreadable) - _SHOWN} more")
    for line in skipped.lines():
        print(f"  not used: {line}")
    if dark := darkness.warning(report["name"], report["brightest"]):
        print(f"  {dark}")
    rate = report["images_per_s"]
    if rate:
        split = max(report["splits"].values(), key=lambda split_report: split_report["images"])
        print(
            f"  two 224 px crops of {rate:,.0f} images/s on {_THREADS} cores: an epoch of "
            f"{split['images']:,} images takes at least {split['images'] / rate / 60:.1f} minutes"
        )
