"""One picture on the host: from its file's bytes to uint8 RGB, to a crop, to another size.

JPEGs go through OpenCV, which makes the same bytes as Pillow in half the time; whatever else there
is goes through Pillow, which may open the kinds in `FORMATS` alone. Both leave Python's lock while
they work, so threads decode side by side.
"""

import contextlib
import functools
import io
import os
import pathlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from disco_jax.data.crops import boxes, centre, resized, uniforms
from disco_jax.errors import UserError

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

_ORIENTATION = 0x0112  # of EXIF; 1 is upright, from 5 on width and height change places
# A JPEG's transform can be undone at 1/2, 1/4 or 1/8 of the size for a fraction of the work.
_SHRINKS = (8, 4, 2)
_JPEG_END = b"\xff\xd9"

# Kinds of pictures that Pillow decodes by itself, the frequent ones first and that without a mark
# at its start last. Left out are those that it hands to other programs (EPS to Ghostscript), films,
# and what it only recognises.
FORMATS = (
    "JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "AVIF", "MPO", "PPM", "DIB", "DDS",
    "ICNS", "ICO", "PCX", "PSD", "QOI", "SGI", "SUN", "TGA",
)  # fmt: skip
MAX_PIXELS = 178_956_970  # where Pillow refuses a picture
RANGES = ("full", "image")


class Part(NamedTuple):
    """A file inside an archive that is not compressed.

    Attributes:
      path: of the archive.
      offset: where the file begins, in bytes.
      size: in bytes.
      name: of the archive and of the file in it, for people.
    """

    path: str
    offset: int
    size: int
    name: str


class Rules(NamedTuple):
    """How pictures are read.

    Attributes:
      range: of the values that become 0..255, of pictures with more than 8 bits a channel:
        "full", all that 16 bits hold; "image", from the lowest to the highest of each picture;
        or (lowest, highest).
      max_pixels: larger pictures count as unreadable.
    """

    range: str | tuple[float, float] = "full"
    max_pixels: int = MAX_PIXELS

    @classmethod
    def parse(cls, range: Any, max_pixels: int) -> "Rules":
        """Of `config.data.range` ("full", "image" or two numbers, "0,4095") and `.max_pixels`.

        Raises:
          UserError: a setting is neither.
        """
        if max_pixels < 1:
            raise UserError(f"config.data.max_pixels={max_pixels} is below 1.")
        if range in RANGES:
            return cls(range, max_pixels)
        try:
            parts = range.strip("()[] ").split(",") if isinstance(range, str) else range
            low, high = (float(part) for part in parts)
        except (TypeError, ValueError):
            low = high = 0.0
        if not -np.inf < low < high < np.inf:
            raise UserError(
                f"config.data.range={range!r} must be 'full', 'image', or the lowest and the "
                "highest value, as in '0,4095'."
            )
        return cls((low, high), max_pixels)


USUAL = Rules()


class Ruled(NamedTuple):
    """A file that is read by other rules than the usual ones."""

    file: "bytes | str | os.PathLike | Part"
    rules: Rules


# What a file holds, or where it lies.
File = bytes | str | os.PathLike | Part | Ruled


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


class _Encoded(NamedTuple):
    data: bytes
    rules: Rules = USUAL


def decode(file: File) -> np.ndarray:
    """One picture as u8[H, W, 3], the first of a file that holds several.

    It is turned as its EXIF orientation says and becomes RGB of 8 bits: transparency is laid over
    white, as viewers show it, and more bits are cut to the range of the rules.

    Args:
      file: of any kind in `FORMATS`.

    Raises:
      Unreadable: it cannot be decoded.
    """
    encoded = _read(file)
    return _pixels(encoded, _header(encoded))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that Pillow here opens."""
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


@functools.cache
def suffixes() -> tuple[str, ...]:
    """The endings of the names of pictures that can be read here, in lower case."""
    kinds = {*_formats(), "MPO"}  # which Pillow opens as a JPEG
    return tuple(sorted(end for end, of in Image.registered_extensions().items() if of in kinds))


@contextlib.contextmanager
def _opened(encoded: _Encoded) -> Iterator[Image.Image]:
    """A picture whose header Pillow has read; what goes wrong inside is the file's fault."""
    limit = encoded.rules.max_pixels
    if Image.MAX_IMAGE_PIXELS is not None and limit > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = limit  # Pillow has one limit for a whole process
    with _reading(limit), Image.open(io.BytesIO(encoded.data), formats=_formats()) as opened:
        width, height = opened.size
        if width * height > limit:
            raise Unreadable(f"{width} x {height} pixels, more than config.data.max_pixels={limit}")
        yield opened


def _header(encoded: _Encoded) -> Header:
    """Size and kind of a picture, without decoding it."""
    with _opened(encoded) as opened:
        width, height = opened.size
        if opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):
            width, height = height, width
        jpeg = opened.format in ("JPEG", "MPO") and opened.mode in ("RGB", "L")
        # OpenCV makes nothing of a JPEG cut short; Pillow says what is wrong with it.
        whole = encoded.data[-64:].rstrip(b"\0").endswith(_JPEG_END)
        return Header(height, width, jpeg and whole)


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


def rgb(picture: Image.Image, values: str | tuple[float, float] = "full") -> Image.Image:
    """A picture of any mode as RGB of 8 bits; see `decode` and `Rules.range`."""
    # 16 bits, which Pillow's own conversion would clip at 255; floats, which it takes for 0..255.
    if picture.mode.startswith("I") or (picture.mode == "F" and values != "full"):
        picture = Image.fromarray(_eight_bits(np.asarray(picture), values))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _eight_bits(deep: np.ndarray, values: str | tuple[float, float]) -> np.ndarray:
    """Numbers of any type as u8, `values` being the range that becomes 0..255."""
    if values == "full":
        return (np.clip(deep, 0, 65_535) >> 8).astype(np.uint8)
    deep = np.nan_to_num(deep.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = (deep.min(), deep.max()) if isinstance(values, str) else values
    if not low < high:
        return np.zeros(deep.shape, np.uint8)
    return np.clip(np.rint((deep - low) * (255 / (high - low))), 0, 255).astype(np.uint8)


def _attempt(function, argument, *others):
    """What a function returns, or the `Unreadable` that it raises or is given first."""
    if isinstance(argument, Unreadable):
        return argument
    try:
        return function(argument, *others)
    except Unreadable as error:
        return error


@contextlib.contextmanager
def _reading(max_pixels: int) -> Iterator[None]:
    """What goes wrong inside is the file's fault: Pillow raises a dozen kinds of exceptions."""
    try:
        yield
    except Unreadable:
        raise
    except UnidentifiedImageError as error:
        raise Unreadable("no kind of picture that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise Unreadable(f"more pixels than config.data.max_pixels={max_pixels}") from error
    except Exception as error:
        raise Unreadable(str(error) or type(error).__name__) from error


def ruled(file: File, rules: Rules) -> File:
    """The file, to be read by `rules`; the usual ones leave it as it is."""
    return file if rules == USUAL or isinstance(file, Ruled) else Ruled(file, rules)


def _read(file: File) -> _Encoded:
    """The bytes of a file and the rules to decode them by."""
    file, rules = file if isinstance(file, Ruled) else (file, USUAL)
    try:
        data = file if isinstance(file, bytes) else _stored(file)
    except (OSError, ValueError) as error:
        raise Unreadable(getattr(error, "strerror", None) or str(error)) from error
    if not data:
        raise Unreadable("the file is empty")
    return _Encoded(data, rules)


def _stored(file: str | os.PathLike | Part) -> bytes:
    """What lies on the disk; opens no pipe, device or socket, which might never end."""
    path = file.path if isinstance(file, Part) else file
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Unreadable("no file but a folder, pipe, device or socket")
    if not isinstance(file, Part):
        return pathlib.Path(path).read_bytes()
    with open(path, "rb") as archive:
        archive.seek(file.offset)
        data = archive.read(file.size)
    if len(data) < file.size:
        raise Unreadable("the archive ends inside of it")
    return data


def _pixels(encoded: _Encoded, known: Header, factor: int = 1) -> np.ndarray:
    """u8[H, W, 3]; a plain JPEG at 1 / factor of its size, rounded up."""
    if known.plain:
        image = _jpeg(encoded.data, factor)
        if image is not None and image.shape[:2] == (
            -(-known.height // factor),
            -(-known.width // factor),
        ):
            return image
    values = encoded.rules.range
    with _opened(encoded) as opened:
        if values != "full" and _has_deep_colours(opened):
            upright = _deep_colours(encoded.data, opened.getexif(), values)
        else:
            upright = ImageOps.exif_transpose(opened)
        return np.asarray(rgb(upright, values))


def _has_deep_colours(opened: Image.Image) -> bool:
    """Whether a picture has 16 bits in each of several channels, of which Pillow keeps 8.

    To be asked before its pixels are read.
    """
    if opened.format not in ("PNG", "TIFF") or opened.mode.startswith(("I", "F")):
        return False
    return any(";16" in str(tile[3]) for tile in opened.tile)  # type: ignore[attr-defined]


def _deep_colours(data: bytes, exif: Image.Exif, values: Any) -> Image.Image:
    """A picture of 16 bits in several channels, upright, with 8 of them; OpenCV keeps all."""
    cv2 = opencv()
    deep = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if deep is None or deep.dtype != np.uint16 or deep.ndim != 3:
        raise Unreadable("16 bits a channel that OpenCV cannot read: use config.data.range=full")
    colours = _eight_bits(deep[..., 2::-1], values)
    if deep.shape[-1] == 4:
        colours = np.dstack([colours, (deep[..., 3] >> 8).astype(np.uint8)])
    picture = Image.fromarray(np.ascontiguousarray(colours))
    picture.getexif()[_ORIENTATION] = exif.get(_ORIENTATION, 1)
    return ImageOps.exif_transpose(picture)


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
