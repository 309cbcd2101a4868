"""Whether the images of a data set come out nearly black, as those of 12 bits in files of 16 do."""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from disco_jax.data import base, decode
from disco_jax.errors import UserError

NEARLY_BLACK = 64  # of 255: where no image of a data set has a brighter value
_LOOKED_AT = 16


def brightest(source: base.Source, split: str, count: int = _LOOKED_AT) -> int | None:
    """The highest value in some images of a split; None if none of them can be read.

    Args:
      source: of the images.
      split: e.g. "train".
      count: images, spread over the stored order; the first ones where a source cannot pick.
    """
    total = source.count(split)
    rows = np.unique(np.linspace(0, total - 1, min(count, total)).astype(int)).tolist()
    try:
        records: Iterable[tuple[str, Any, int]] = source.chosen(split, rows)
    except UserError:
        records = itertools.islice(source.pictures(split), count)
    values = [value for _, image, _ in records if (value := brightest_of(image)) is not None]
    return max(values, default=None)


def brightest_of(image: Any) -> int | None:
    """The highest value of an image, as `Source.pictures` gives it; None if it is unreadable."""
    try:
        return int((image if isinstance(image, np.ndarray) else decode.decode(image)).max())
    except decode.Unreadable:
        return None


def warning(name: str, value: int | None) -> str:
    """What to tell of a data set whose brightest value is this; "" if nothing."""
    if value is None or value >= NEARLY_BLACK:
        return ""
    return (
        f"The images of {name} are nearly black: the brightest value is {value} of 255. If they "
        "have 10 to 16 bits, set config.data.range to 'image' or to their lowest and highest "
        "value, as in '0,4095'."
    )
