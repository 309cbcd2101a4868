"""Decoding, cropping and resizing of single images on the host.

OpenCV decodes JPEGs: it gives the same pixels as Pillow in half the time. Pillow decodes all other
formats listed in `FORMATS`. Both release the GIL, so threads decode in parallel.
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

_ORIENTATION = 0x0112  # EXIF tag; 1 is upright, values of 5 and above swap width and height
# A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size for a fraction of the cost.
_JPEG_REDUCTIONS = (8, 4, 2)
_JPEG_END = b"\xff\xd9"

# Formats that Pillow decodes itself, the most frequent first. TGA has no magic number and comes
# last. Excluded are formats that Pillow passes to other programs (EPS to Ghostscript), videos, and
# formats that it recognises but cannot decode.
FORMATS = (
    "JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "AVIF", "MPO", "PPM", "DIB", "DDS",
    "ICNS", "ICO", "PCX", "PSD", "QOI", "SGI", "SUN", "TGA",
)  # fmt: skip
MAX_PIXELS = 178_956_970  # above this Pillow refuses an image
RANGES = ("full", "image")


class Part(NamedTuple):
    """A file inside an uncompressed archive.

    Attributes:
      path: path of the archive.
      offset: offset of the file in the archive, in bytes.
      size: size of the file in bytes.
      name: display name: the archive and the file in it.
    """

    path: str
    offset: int
    size: int
    name: str


class Rules(NamedTuple):
    """Settings for decoding images.

    Attributes:
      range: range of values mapped to 0..255 for images with more than 8 bits per channel:
        "full", the whole 16-bit range; "image", from the lowest to the highest value of each
        image; or (lowest, highest).
      max_pixels: larger images count as unreadable.
    """

    range: str | tuple[float, float] = "full"
    max_pixels: int = MAX_PIXELS

    @classmethod
    def parse(cls, range: Any, max_pixels: int) -> "Rules":
        """Parses `config.data.range` and `config.data.max_pixels`.

        Args:
          range: "full", "image", or two numbers as a sequence or a string such as "0,4095".
          max_pixels: maximum number of pixels, at least 1.

        Raises:
          UserError: a setting is invalid.
        """
        if max_pixels < 1:
            raise UserError(f"config.data.max_pixels={max_pixels} must be at least 1.")
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
                "highest value, e.g. '0,4095'."
            )
        return cls((low, high), max_pixels)


DEFAULT_RULES = Rules()


class Ruled(NamedTuple):
    """A file that is decoded with other rules than the default ones."""

    file: "bytes | str | os.PathLike | Part"
    rules: Rules


# The bytes of an encoded image, or their location.
File = bytes | str | os.PathLike | Part | Ruled


class Unreadable(Exception):
    """Raised for an image that cannot be decoded."""


class Header(NamedTuple):
    """The metadata of an image, available without decoding its pixels.

    Attributes:
      height: height in pixels after the EXIF rotation.
      width: width in pixels after the EXIF rotation.
      plain: whether it is a complete RGB or greyscale JPEG, which OpenCV decodes like Pillow.
    """

    height: int
    width: int
    plain: bool


class _Encoded(NamedTuple):
    data: bytes
    rules: Rules = DEFAULT_RULES


def decode(file: File) -> np.ndarray:
    """Decodes an image to u8[H, W, 3]; takes the first frame of a file with several.

    The image is rotated according to its EXIF orientation and converted to 8-bit RGB. Transparent
    images are composited over white, as viewers show them; deeper channels are mapped to 8 bits by
    `Rules.range`.

    Args:
      file: an encoded image of any format in `FORMATS`.

    Raises:
      Unreadable: the image cannot be decoded.
    """
    encoded = _read(file)
    return _pixels(encoded, _header(encoded))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Returns the formats in `FORMATS` that the installed Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def suffixes() -> tuple[str, ...]:
    """Returns the lower-case file name suffixes of the supported image formats."""
    supported = {*_formats(), "MPO"}  # Pillow opens MPO files as JPEG
    return tuple(
        sorted(
            suffix
            for suffix, image_format in Image.registered_extensions().items()
            if image_format in supported
        )
    )


@contextlib.contextmanager
def _opened(encoded: _Encoded) -> Iterator[Image.Image]:
    """Yields an image whose header Pillow has read; errors inside become `Unreadable`."""
    limit = encoded.rules.max_pixels
    if Image.MAX_IMAGE_PIXELS is not None and limit > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = limit  # Pillow has one limit per process
    with (
        _translate_errors(limit),
        Image.open(io.BytesIO(encoded.data), formats=_formats()) as opened,
    ):
        width, height = opened.size
        if width * height > limit:
            raise Unreadable(f"{width} x {height} pixels, more than config.data.max_pixels={limit}")
        yield opened


def _header(encoded: _Encoded) -> Header:
    """Reads the size and kind of an image without decoding it."""
    with _opened(encoded) as opened:
        width, height = opened.size
        if opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):
            width, height = height, width
        jpeg = opened.format in ("JPEG", "MPO") and opened.mode in ("RGB", "L")
        # OpenCV fails on truncated JPEGs without a reason; Pillow reports one.
        complete = encoded.data[-64:].rstrip(b"\0").endswith(_JPEG_END)
        return Header(height, width, jpeg and complete)


def crops_of(
    files: Sequence[File],
    views: Mapping[int, Any],
    seeds: tuple[int, int, int],
    first: int,
) -> list[list[np.ndarray] | Unreadable]:
    """Decodes consecutive images of an epoch and returns their random resized crops.

    A JPEG several times larger than its crops is decoded at 1/2, 1/4 or 1/8 of its size, never
    below the resolution that the crops need. Otherwise, with antialias="exact", the pixels equal
    torchvision's for the same boxes. The crops of an image do not depend on its neighbours.

    Args:
      files: the encoded images.
      views: view -> its crop, an object with the fields of `views.Crop`.
      seeds: (seed, epoch, host), which determine the boxes together with view and position.
      first: position of the first image in this host's epoch.

    Returns:
      For each image, one u8[S, S, 3] per view, or the `Unreadable` error.
    """
    encoded = [_try_decoding(_read, file) for file in files]
    headers = [_try_decoding(_header, image) for image in encoded]
    sides = np.array([(1, 1) if isinstance(h, Unreadable) else h[:2] for h in headers])
    heights, widths = sides.T
    draws = {view: uniforms(*seeds, view, first, len(files)) for view in views}
    view_boxes = [
        boxes(draws[view], heights, widths, crop.scale, crop.ratio).tolist()
        for view, crop in views.items()
    ]
    return [
        header
        if isinstance(header, Unreadable)
        else _try_decoding(_crop_views, image, header, views, image_boxes)
        for image, header, *image_boxes in zip(encoded, headers, *view_boxes, strict=True)
    ]


def evaluated(image: np.ndarray, size: int, height: int, interpolation: str) -> np.ndarray:
    """Resizes and center-crops an image for evaluation; see `contract.Source.evaluate`.

    Equal to torchvision's Resize and CenterCrop on a PIL image.

    Args:
      image: u8[H, W, 3] or u8[H, W].
      size: side of the square crop in pixels.
      height: length of the shorter side before cropping; 0 resizes the whole image to the square
        and ignores its aspect ratio.
      interpolation: "bilinear" or "bicubic", antialiased.

    Returns:
      u8[size, size, 3 or 1].
    """
    if not height:
        return resize(image, size, size, interpolation)
    rows, columns = resized(image.shape[0], image.shape[1], height)
    top, left_edge = centre(rows, columns, size)
    return resize(image, rows, columns, interpolation)[
        top : top + size, left_edge : left_edge + size
    ]


def resize(
    image: np.ndarray, height: int, width: int, interpolation: str, antialias: str = "exact"
) -> np.ndarray:
    """Resizes an image.

    Args:
      image: u8[H, W, 3] or u8[H, W].
      height: new height in pixels.
      width: new width in pixels.
      interpolation: "bilinear" or "bicubic".
      antialias: "exact": the filter widens when the image shrinks; the pixels equal Pillow's and
        torchvision's. "area": shrinking averages the pixels covered by each new one (OpenCV's
        INTER_AREA), enlarging equals "none". "none": 4 (bilinear) or 16 (bicubic) neighbours at
        any scale, like torch's `interpolate` without antialias.

    Returns:
      u8[height, width, 3 or 1].
    """
    if image.shape[:2] == (height, width):
        return image[..., None] if image.ndim == 2 else image
    if antialias == "exact":
        pil_image = Image.fromarray(np.ascontiguousarray(image))
        image = np.asarray(pil_image.resize((width, height), FILTERS[interpolation]))
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
    """Imports and returns cv2, lazily because the import is slow."""
    import cv2

    cv2.setNumThreads(0)  # disables OpenCV's own threads; this package has a pool
    return cv2


def rgb(pil_image: Image.Image, values: str | tuple[float, float] = "full") -> Image.Image:
    """Converts a PIL image of any mode to 8-bit RGB; see `decode` and `Rules.range`."""
    # Pillow's own conversion would clip 16-bit values at 255 and assume that floats lie in 0..255.
    if pil_image.mode.startswith("I") or (pil_image.mode == "F" and values != "full"):
        pil_image = Image.fromarray(_to_uint8(np.asarray(pil_image), values))
    if pil_image.has_transparency_data:
        pil_image = pil_image.convert("RGBA")
        white = Image.new("RGBA", pil_image.size, "white")
        pil_image = Image.alpha_composite(white, pil_image)
    return pil_image.convert("RGB")


def _to_uint8(deep: np.ndarray, values: str | tuple[float, float]) -> np.ndarray:
    """Converts numbers of any type to u8; `values` is the range that is mapped to 0..255."""
    if values == "full":
        return (np.clip(deep, 0, 65_535) >> 8).astype(np.uint8)
    deep = np.nan_to_num(deep.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = (deep.min(), deep.max()) if isinstance(values, str) else values
    if not low < high:
        return np.zeros(deep.shape, np.uint8)
    return np.clip(np.rint((deep - low) * (255 / (high - low))), 0, 255).astype(np.uint8)


def _try_decoding(function, argument, *others):
    """Calls a function; returns an `Unreadable` that it raises, or that is its argument."""
    if isinstance(argument, Unreadable):
        return argument
    try:
        return function(argument, *others)
    except Unreadable as error:
        return error


@contextlib.contextmanager
def _translate_errors(max_pixels: int) -> Iterator[None]:
    """Turns any exception raised inside into `Unreadable`: Pillow raises a dozen kinds."""
    try:
        yield
    except Unreadable:
        raise
    except UnidentifiedImageError as error:
        raise Unreadable("not an image format that Pillow supports") from error
    except Image.DecompressionBombError as error:
        raise Unreadable(f"more pixels than config.data.max_pixels={max_pixels}") from error
    except Exception as error:
        raise Unreadable(str(error) or type(error).__name__) from error


def ruled(file: File, rules: Rules) -> File:
    """Attaches decoding rules to a file; returns it unchanged for the default rules."""
    return file if rules == DEFAULT_RULES or isinstance(file, Ruled) else Ruled(file, rules)


def _read(file: File) -> _Encoded:
    """Reads the bytes of a file and returns them with their decoding rules."""
    file, rules = file if isinstance(file, Ruled) else (file, DEFAULT_RULES)
    try:
        data = file if isinstance(file, bytes) else _read_bytes(file)
    except (OSError, ValueError) as error:
        raise Unreadable(getattr(error, "strerror", None) or str(error)) from error
    if not data:
        raise Unreadable("the file is empty")
    return _Encoded(data, rules)


def _read_bytes(file: str | os.PathLike | Part) -> bytes:
    """Reads a file from disk; refuses pipes, devices and sockets, which could block forever."""
    path = file.path if isinstance(file, Part) else file
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Unreadable("not a regular file (a folder, pipe, device or socket)")
    if not isinstance(file, Part):
        return pathlib.Path(path).read_bytes()
    with open(path, "rb") as archive:
        archive.seek(file.offset)
        data = archive.read(file.size)
    if len(data) < file.size:
        raise Unreadable("the archive is truncated")
    return data


def _pixels(encoded: _Encoded, header: Header, factor: int = 1) -> np.ndarray:
    """Decodes to u8[H, W, 3]; a plain JPEG at 1 / factor of its size, rounded up."""
    if header.plain:
        image = _jpeg(encoded.data, factor)
        if image is not None and image.shape[:2] == (
            -(-header.height // factor),
            -(-header.width // factor),
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
    """Returns whether an image has several 16-bit channels, which Pillow reduces to 8 bits.

    Must be called before the pixels are read.
    """
    if opened.format not in ("PNG", "TIFF") or opened.mode.startswith(("I", "F")):
        return False
    return any(";16" in str(tile[3]) for tile in opened.tile)  # type: ignore[attr-defined]


def _deep_colours(data: bytes, exif: Image.Exif, values: Any) -> Image.Image:
    """Decodes an image of several 16-bit channels with OpenCV to an upright 8-bit PIL image."""
    cv2 = opencv()
    deep = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if deep is None or deep.dtype != np.uint16 or deep.ndim != 3:
        raise Unreadable("OpenCV cannot read its 16-bit channels: use config.data.range=full")
    colours = _to_uint8(deep[..., 2::-1], values)
    if deep.shape[-1] == 4:
        colours = np.dstack([colours, (deep[..., 3] >> 8).astype(np.uint8)])
    pil_image = Image.fromarray(np.ascontiguousarray(colours))
    pil_image.getexif()[_ORIENTATION] = exif.get(_ORIENTATION, 1)
    return ImageOps.exif_transpose(pil_image)


def _jpeg(encoded: bytes, factor: int) -> np.ndarray | None:
    """Decodes a JPEG with OpenCV to an upright u8[H, W, 3], or returns None if that fails."""
    cv2, data = opencv(), np.frombuffer(encoded, np.uint8)
    try:
        if factor == 1:
            return cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
        image = cv2.imdecode(data, getattr(cv2, f"IMREAD_REDUCED_COLOR_{factor}"))
        return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    except cv2.error:
        return None


def _crop_views(encoded, header, views, crop_boxes):
    """Decodes one image and returns its crop u8[S, S, 3] for each view."""
    factor = _jpeg_reduction(crop_boxes, views) if header.plain else 1
    image = _pixels(encoded, header, factor)
    scales = (image.shape[0] / header.height, image.shape[1] / header.width)
    return [
        _crop_and_resize(image, box, scales, crop)
        for box, crop in zip(crop_boxes, views.values(), strict=True)
    ]


def _jpeg_reduction(crop_boxes, views) -> int:
    """Returns the largest JPEG reduction at which no crop has to be enlarged because of it."""
    max_reduction = min(
        min(box[2:]) / crop.size for box, crop in zip(crop_boxes, views.values(), strict=True)
    )
    return next((factor for factor in _JPEG_REDUCTIONS if factor <= max_reduction), 1)


def _crop_and_resize(image: np.ndarray, box, scales, crop) -> np.ndarray:
    """Returns u8[S, S, 3], the box (top, left, height, width) of an image decoded at `scales`."""
    top, left_edge, height, width = box
    size = crop.size
    if scales != (1.0, 1.0):
        y, x = scales
        top, bottom = top * y, (top + height) * y
        left_edge, right_edge = left_edge * x, (left_edge + width) * x
        if crop.antialias == "exact":  # Pillow crops at fractions of a pixel
            pil_image = Image.fromarray(image)
            scaled = (left_edge, top, right_edge, bottom)
            return np.asarray(
                pil_image.resize((size, size), FILTERS[crop.interpolation], box=scaled)
            )
        top, left_edge = round(top), round(left_edge)
        height, width = round(bottom) - top, round(right_edge) - left_edge
    # Crop before resizing, as torchvision does, so that the filter sees no pixels outside the box.
    cropped = image[top : top + height, left_edge : left_edge + width]
    return resize(cropped, size, size, crop.interpolation, crop.antialias)
