"""Detection of data sets that decode to nearly black images, e.g. 12-bit data in 16-bit files."""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from disco_jax.data import contract, decode
from disco_jax.errors import UserError

NEARLY_BLACK = 64  # of 255; warn if no image has a value this bright
_NUM_SAMPLED = 16


def brightest(source: contract.Source, split: str, count: int = _NUM_SAMPLED) -> int | None:
    """Returns the highest pixel value in a sample of a split, or None if all are unreadable.

    Args:
      source: source of the images.
      split: name of the split, e.g. "train".
      count: number of images, spread evenly over the stored order; the first ones if the source
        does not support random access.
    """
    total = source.count(split)
    rows = np.unique(np.linspace(0, total - 1, min(count, total)).astype(int)).tolist()
    try:
        records: Iterable[tuple[str, Any, int]] = source.take(split, rows)
    except UserError:
        records = itertools.islice(source.iter_images(split), count)
    values = [value for _, image, _ in records if (value := brightest_of(image)) is not None]
    return max(values, default=None)


def brightest_of(image: Any) -> int | None:
    """Returns the highest pixel value of an image, or None if it is unreadable.

    Args:
      image: image from `Source.iter_images`, as an array or encoded.
    """
    try:
        return int((image if isinstance(image, np.ndarray) else decode.decode(image)).max())
    except decode.Unreadable:
        return None


def warning(name: str, value: int | None) -> str:
    """Returns the warning for a data set with this highest pixel value, or ""."""
    if value is None or value >= NEARLY_BLACK:
        return ""
    return (
        f"The images of {name} are nearly black: the brightest value is {value} of 255. If they "
        "have 10 to 16 bits, set config.data.range to 'image' or to their lowest and highest "
        "value, as in '0,4095'."
    )
