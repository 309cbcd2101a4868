"""One picture on the host: from its file's bytes to uint8 RGB, to a crop, to another size.

JPEGs go through OpenCV, which makes the same bytes as Pillow in half the time; whatever else there
is goes through Pillow. Both leave Python's lock while they work, so threads decode side by side.
"""

import contextlib
import functools
import io
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from disco_jax.data.crops import boxes, centre, resized, uniforms

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

_ORIENTATION = 0x0112  # of EXIF; 1 is upright, from 5 on width and height change places
# A JPEG's transform can be undone at 1/2, 1/4 or 1/8 of the size for a fraction of the work.
_SHRINKS = (8, 4, 2)
_JPEG_END = b"\xff\xd9"

File = bytes | str | os.PathLike  # what a file holds, or where it lies


class Unreadable(Exception):
    """A picture that cannot be decoded."""


class Header(NamedTuple):
    """What is known of a picture before its pixels are.

    Attributes:
      height: in pixels, once it is upright.
      width: likewise.
      plain: whether it is a complete JPEG of RGB or grey, which OpenCV reads as Pillow does.
    """

    height: int
    width: int
    plain: bool


def decode(file: File) -> np.ndarray:
    """One picture as u8[H, W, 3].

    It is turned as its EXIF orientation says and becomes RGB of 8 bits: transparency is laid over
    white, as viewers show it, and 16 bits keep their upper half.

    Args:
      file: of a JPEG, PNG, WebP, BMP, or what else Pillow reads.

    Raises:
      Unreadable: it cannot be decoded.
    """
    encoded = _read(file)
    return _pixels(encoded, _header(encoded))


def _header(encoded: bytes) -> Header:
    """Size and kind of a picture, without decoding it."""
    with _reading(), Image.open(io.BytesIO(encoded)) as opened:
        width, height = opened.size
        if opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):
            width, height = height, width
        jpeg = opened.format in ("JPEG", "MPO") and opened.mode in ("RGB", "L")
        # OpenCV makes nothing of a JPEG cut short; Pillow says what is wrong with it.
        return Header(height, width, jpeg and encoded[-64:].rstrip(b"\0").endswith(_JPEG_END))


def crops_of(
    files: Sequence[File],
    views: Mapping[int, Any],
    where: tuple[int, int, int],
    first: int,
) -> list[list[np.ndarray] | Unreadable]:
    """Random resized crops of pictures that follow one another in an epoch.

    A JPEG several times larger than its crops is decoded at 1/2, 1/4 or 1/8 of its size, never
    below what the crops need; otherwise, with antialias="exact", the bytes are torchvision's for
    the same boxes. What a picture gives does not depend on those before or after it.

    Args:
      files: of the pictures.
      views: view -> its crop, an object with the fields of `views.Crop`.
      where: (seed, epoch, host), what the boxes are drawn from besides view and position.
      first: the position of the first picture in this host's epoch.

    Returns:
      One u8[S, S, 3] a view for each picture, or why it cannot be decoded.
    """
    encoded = [_attempt(_read, file) for file in files]
    headers = [_attempt(_header, picture) for picture in encoded]
    sides = np.array([(1, 1) if isinstance(h, Unreadable) else h[:2] for h in headers])
    heights, widths = sides.T
    draws = {view: uniforms(*where, view, first, len(files)) for view in views}
    places = [
        boxes(draws[view], heights, widths, crop.scale, crop.ratio).tolist()
        for view, crop in views.items()
    ]
    return [
        known if isinstance(known, Unreadable) else _attempt(_cut_all, picture, known, views, place)
        for picture, known, *place in zip(encoded, headers, *places, strict=True)
    ]


def evaluated(image: np.ndarray, size: int, height: int, interpolation: str) -> np.ndarray:
    """u8[size, size, 3 or 1]: an image resized, then cut to its middle; see `base.Source`.

    Equal to torchvision's Resize and CenterCrop on a PIL image.

    Args:
      image: u8[H, W, 3] or u8[H, W].
      size: the side of the square.
      height: of the shorter side before the cut; 0 squeezes the whole image to the square.
      interpolation: "bilinear" or "bicubic", antialiased.
    """
    if not height:
        return resize(image, size, size, interpolation)
    rows, columns = resized(image.shape[0], image.shape[1], height)
    top, left = centre(rows, columns, size)
    return resize(image, rows, columns, interpolation)[top : top + size, left : left + size]


def resize(
    image: np.ndarray, height: int, width: int, interpolation: str, antialias: str = "exact"
) -> np.ndarray:
    """An image of another size.

    Args:
      image: u8[H, W, 3] or u8[H, W].
      height: in pixels.
      width: in pixels.
      interpolation: "bilinear" or "bicubic".
      antialias: "exact": the filter widens as the image shrinks, the bytes are Pillow's (and so
        torchvision's). "area": shrinking takes the mean of the pixels under each new one, where
        it enlarges as "none" does (OpenCV's INTER_AREA). "none": 4 or 16 neighbours whatever the
        size, as torch's `interpolate` without antialias.

    Returns:
      u8[height, width, 3 or 1].
    """
    if image.shape[:2] == (height, width):
        return image[..., None] if image.ndim == 2 else image
    if antialias == "exact":
        picture = Image.fromarray(np.ascontiguousarray(image))
        image = np.asarray(picture.resize((width, height), FILTERS[interpolation]))
    else:
        cv2 = opencv()
        shrinks = antialias == "area" and (height < image.shape[0] and width < image.shape[1])
        plain = cv2.INTER_LINEAR if interpolation == "bilinear" else cv2.INTER_CUBIC
        image = cv2.resize(
            image, (width, height), interpolation=cv2.INTER_AREA if shrinks else plain
        )
    return image[..., None] if image.ndim == 2 else image


@functools.cache
def opencv():
    """cv2, imported when it is first needed, and kept to the thread that calls it: we have ours."""
    import cv2

    cv2.setNumThreads(0)
    return cv2


def rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode as RGB of 8 bits; see `decode`."""
    if picture.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would clip at 255
        grey = np.clip(np.asarray(picture), 0, 65_535) >> 8
        picture = Image.fromarray(grey.astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _attempt(function, argument, *others):
    """What a function returns, or the `Unreadable` that it raises or is given first."""
    if isinstance(argument, Unreadable):
        return argument
    try:
        return function(argument, *others)
    except Unreadable as error:
        return error


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """What goes wrong inside is the file's fault: Pillow raises a dozen kinds of exceptions."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise Unreadable("no kind of picture that Pillow knows") from error
    except Exception as error:
        raise Unreadable(str(error) or type(error).__name__) from error


def _read(file: File) -> bytes:
    """The bytes of a file."""
    if isinstance(file, bytes):
        encoded = file
    else:
        try:
            encoded = pathlib.Path(file).read_bytes()
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from error
    if not encoded:
        raise Unreadable("the file is empty")
    return encoded


def _pixels(encoded: bytes, known: Header, factor: int = 1) -> np.ndarray:
    """u8[H, W, 3]; a plain JPEG at 1 / factor of its size, rounded up."""
    if known.plain:
        image = _jpeg(encoded, factor)
        if image is not None and image.shape[:2] == (
            -(-known.height // factor),
            -(-known.width // factor),
        ):
            return image
    with _reading(), Image.open(io.BytesIO(encoded)) as opened:
        return np.asarray(rgb(ImageOps.exif_transpose(opened)))


def _jpeg(encoded: bytes, factor: int) -> np.ndarray | None:
    """OpenCV's u8[H, W, 3] of a JPEG, upright; None where it fails."""
    cv2, data = opencv(), np.frombuffer(encoded, np.uint8)
    try:
        if factor == 1:
            return cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
        image = cv2.imdecode(data, getattr(cv2, f"IMREAD_REDUCED_COLOR_{factor}"))
        return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    except cv2.error:
        return None


def _cut_all(encoded, known, views, places):
    """One u8[S, S, 3] a view of one picture."""
    factor = _shrink(places, views) if known.plain else 1
    image = _pixels(encoded, known, factor)
    shrunk = (image.shape[0] / known.height, image.shape[1] / known.width)
    return [
        _cut(image, place, shrunk, crop) for place, crop in zip(places, views.values(), strict=True)
    ]


def _shrink(places, views) -> int:
    """By how much a JPEG can shrink while no crop gets fewer pixels than it has to show."""
    room = min(min(p[2:]) / crop.size for p, crop in zip(places, views.values(), strict=True))
    return next((factor for factor in _SHRINKS if factor <= room), 1)


def _cut(image: np.ndarray, place, shrunk, crop) -> np.ndarray:
    """The box (top, left, height, width) of the whole picture, u8[S, S, 3]."""
    top, left, height, width = place
    size = crop.size
    if shrunk != (1.0, 1.0):
        y, x = shrunk
        top, left, bottom, right = top * y, left * x, (top + height) * y, (left + width) * x
        if crop.antialias == "exact":  # cuts at fractions of a pixel
            picture = Image.fromarray(image)
            box = (left, top, right, bottom)
            return np.asarray(picture.resize((size, size), FILTERS[crop.interpolation], box=box))
        top, left = round(top), round(left)
        height, width = round(bottom) - top, round(right) - left
    # Cut first, as torchvision does: a filter then sees nothing outside the box.
    part = image[top : top + height, left : left + width]
    return resize(part, size, size, crop.interpolation, crop.antialias)
