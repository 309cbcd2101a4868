"""Decoding of single images: formats, faults, parity with Pillow, and the antialias modes."""

import io
import os

import numpy as np
import pytest
from PIL import Image, ImageOps

import helpers
from disco_jax.data import decode
from disco_jax.errors import UserError
from helpers import crop

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (30, 41, 3), np.uint8)


def encode(image, kind="JPEG", **options):
    file = io.BytesIO()
    pil_image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    pil_image.save(file, kind, **options)
    return file.getvalue()


def pillows(encoded):
    with Image.open(io.BytesIO(encoded)) as opened:
        return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))


# ---- kinds


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 10}, {"optimize": True}]
)
@pytest.mark.parametrize("grey", [False, True])
def test_jpegs_are_decoded_as_pillow_does(monkeypatch, options, grey):
    encoded = encode(NOISE[..., 0] if grey else NOISE, **options)
    want = pillows(encoded)
    monkeypatch.setattr(decode, "rgb", None)  # fails if Pillow is used
    np.testing.assert_array_equal(decode.decode(encoded), want)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pictures_are_turned_as_exif_says(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(NOISE, kind, exif=exif)
    image = decode.decode(encoded)
    np.testing.assert_array_equal(image, pillows(encoded))
    assert image.shape[:2] == ((41, 30) if orientation in (5, 6, 7, 8) else (30, 41))
    views = {0: crop(16, scale=(1.0, 1.0), ratio=(0.01, 100.0))}  # nearly all of it
    (cut,) = decode.crops_of([encoded], views, (0, 0, 0), 0)
    assert cut[0].shape == (16, 16, 3)


def test_every_kind_of_picture_becomes_rgb():
    clear = Image.new("RGB", (20, 16), (10, 200, 30)).quantize(4)
    deep = Image.fromarray(np.full((16, 20), 0x4D12, np.uint16))
    cases = {
        "grey": (encode(Image.new("L", (20, 16), 77), "PNG"), (77, 77, 77)),
        "bit": (encode(Image.new("1", (20, 16), 1), "PNG"), (255, 255, 255)),
        "palette": (encode(clear, "PNG"), (10, 200, 30)),
        "palette, clear": (encode(clear, "PNG", transparency=0), (255, 255, 255)),
        "alpha": (encode(Image.new("RGBA", (20, 16), (0, 0, 255, 51)), "PNG"), (204, 204, 255)),
        "grey, alpha": (encode(Image.new("LA", (20, 16), (0, 0)), "PNG"), (255, 255, 255)),
        "16 bits": (encode(deep, "PNG"), (0x4D, 0x4D, 0x4D)),
        "CMYK": (
            encode(Image.new("CMYK", (20, 16), (0, 255, 255, 0)), "JPEG", quality=100),
            (255, 0, 0),
        ),
        "WebP": (encode(Image.new("RGB", (20, 16), (9, 8, 7)), "WEBP", lossless=True), (9, 8, 7)),
        "BMP": (encode(Image.new("RGB", (20, 16), (9, 8, 7)), "BMP"), (9, 8, 7)),
    }
    for name, (encoded, want) in cases.items():
        image = decode.decode(encoded)
        assert image.shape == (16, 20, 3) and image.dtype == np.uint8
        assert np.abs(image.astype(int) - want).max() <= 2, name


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (20_000, 3)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("antialias", ["exact", "area", "none"])
def test_pictures_of_any_shape_are_cropped(size, kind, antialias):
    encoded = encode(Image.new("RGB", size, (80, 80, 80)), kind)
    views = {0: crop(antialias=antialias), 1: crop(5, scale=(0.01, 0.1), antialias=antialias)}
    for cut in decode.crops_of([encoded] * 3, views, (0, 0, 0), 0):
        assert [view.shape for view in cut] == [(8, 8, 3), (5, 5, 3)]
        assert all(np.abs(view.astype(int) - 80).max() <= 1 for view in cut)
    middle = decode.evaluated(decode.decode(encoded), 8, 10, "bilinear")
    assert middle.shape == (8, 8, 3) and np.abs(middle.astype(int) - 80).max() <= 1


# ---- faults


def broken():
    jpeg, png = encode(NOISE, quality=95), encode(NOISE, "PNG")
    return {
        "nothing": (b"", "empty"),
        "text": (b"hello", "not an image format"),
        "half a JPEG": (jpeg[: len(jpeg) // 2], "truncated"),
        "the start of a JPEG": (jpeg[:3], "."),
        "half a PNG": (png[: len(png) // 2], "truncated"),
        "a JPEG of nothing": (b"\xff\xd8\xff\xd9", "."),
    }


@pytest.mark.parametrize("name", broken())
def test_broken_pictures_are_unreadable_and_leave_their_neighbours_alone(name):
    bad, reason = broken()[name]
    with pytest.raises(decode.Unreadable, match=reason):
        decode.decode(bad)
    good, views = encode(NOISE), {0: crop(), 1: crop(6)}
    alone = decode.crops_of([good] * 3, views, (0, 0, 0), 4)
    first, second, third = decode.crops_of([good, bad, good], views, (0, 0, 0), 4)
    assert isinstance(second, decode.Unreadable)
    for cropped, want in zip((*first, *third), (*alone[0], *alone[2]), strict=True):
        np.testing.assert_array_equal(cropped, want)


def test_a_file_that_is_not_there_is_unreadable(tmp_path):
    with pytest.raises(decode.Unreadable, match="No such file"):
        decode.decode(tmp_path / "none.png")


def test_damaged_jpegs_are_read_where_pillow_reads_them():
    """Bytes are changed or cut at random: pixels equal Pillow's if it decodes, and nothing crashes.

    About one in a hundred images that Pillow rejects is read with visible damage.
    """
    rng, whole, read, passed = np.random.default_rng(1), encode(NOISE, quality=80), 0, 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(2, len(data))] = rng.integers(256)
        if rng.random() < 0.3:
            del data[rng.integers(len(data) // 2, len(data)) :]
        data = bytes(data)
        try:
            want = pillows(data)
        except Exception:
            want = None
        try:
            image = decode.decode(data)
        except decode.Unreadable:
            assert want is None
            continue
        read += 1
        passed += want is None
        if want is not None:
            np.testing.assert_array_equal(image, want)
    assert 40 < read < 360 and passed < 20


# ---- formats that may be opened, and conversion of deep images to 8 bits


@pytest.mark.parametrize(
    "kind, options",
    [("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("GIF", {}), ("PPM", {}), ("TGA", {}),
     ("JPEG2000", {"irreversible": False}), ("AVIF", {"quality": 100}), ("ICO", {}), ("PCX", {}),
     ("QOI", {}), ("DDS", {})],
)  # fmt: skip
def test_what_else_pillow_decodes_is_read(kind, options):
    pil_image = Image.new("RGB", (32, 32), (10, 200, 30))
    if kind not in Image.SAVE:
        Image.init()
    further_frames = [Image.new("RGB", (32, 32), "white")]
    options = {"save_all": True, "append_images": further_frames} if kind == "GIF" else options
    image = decode.decode(encode(pil_image, kind, **options))  # the first of several frames
    assert image.shape == (32, 32, 3) and np.abs(image.astype(int) - (10, 200, 30)).max() <= 4


def test_suffixes_are_those_of_kinds_that_may_be_opened():
    ends = {".jpg", ".jfif", ".png", ".webp", ".tif", ".tiff", ".gif", ".jp2", ".avif", ".mpo"}
    assert ends <= set(decode.suffixes())
    assert not {".eps", ".ps", ".pdf", ".wmf", ".emf", ".h5", ".mpg", ".svg"} & set(
        decode.suffixes()
    )


@pytest.mark.parametrize(
    "start",
    [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
     b"\xd7\xcd\xc6\x9a" + bytes(60), b"%PDF-1.4\n", b"SIMPLE  =" + b" " * 21],
)  # fmt: skip
def test_other_programs_are_never_asked(tmp_path, monkeypatch, start):
    """Without a list of formats, a PostScript file called .png would start Ghostscript."""
    from PIL import EpsImagePlugin

    def started(*args, **kwargs):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    (tmp_path / "a.png").write_bytes(start)
    with pytest.raises(decode.Unreadable, match="not an image format"):
        decode.decode(tmp_path / "a.png")


def test_pipes_devices_and_links_to_them_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe", "link", "zero", "folder"):
        with pytest.raises(decode.Unreadable, match=r"not a regular file \(a folder, pipe"):
            decode.decode(tmp_path / f"{name}.png")


def test_too_many_pixels_are_told_with_the_setting_that_allows_them(monkeypatch):
    encoded = encode(Image.new("L", (30, 20)), "PNG")
    assert decode.decode(decode.ruled(encoded, decode.Rules(max_pixels=600))).shape == (20, 30, 3)
    small = decode.ruled(encoded, decode.Rules(max_pixels=599))
    with pytest.raises(decode.Unreadable, match=r"30 x 20 pixels.*config\.data\.max_pixels=599"):
        decode.decode(small)
    (cut,) = decode.crops_of([small], {0: crop()}, (0, 0, 0), 0)
    assert isinstance(cut, decode.Unreadable)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses 200 and more
    with pytest.raises(decode.Unreadable, match=r"config\.data\.max_pixels=199"):
        decode.decode(decode.ruled(encoded, decode.Rules(max_pixels=199)))
    assert decode.decode(decode.ruled(encoded, decode.Rules(max_pixels=1000))).shape == (20, 30, 3)


DEEP = np.linspace(0, 4080, 12).astype(np.uint16).reshape(3, 4)  # 12 bits


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    "setting, want",
    [
        ("full", DEEP >> 8),
        ("image", np.rint(DEEP / 16)),
        ("0,4080", np.rint(DEEP / 16)),
        ("(100, 2000)", np.clip(np.rint((DEEP - 100.0) * 255 / 1900), 0, 255)),
    ],
)
def test_sixteen_bits_are_cut_to_the_range(kind, setting, want):
    rules = decode.Rules.parse(setting, decode.MAX_PIXELS)
    image = decode.decode(decode.ruled(encode(DEEP, kind), rules))
    np.testing.assert_array_equal(image, np.repeat(want[..., None], 3, axis=2))


def test_sixteen_bits_of_colours_are_cut_to_the_range():
    """Pillow alone would keep the upper eight bits."""
    colours = np.stack([DEEP, DEEP[::-1], DEEP // 2], axis=-1)
    _, written = decode.opencv().imencode(".png", colours[..., ::-1])
    encoded = written.tobytes()
    np.testing.assert_array_equal(decode.decode(encoded), colours >> 8)
    cut = decode.decode(decode.ruled(encoded, decode.Rules("image")))
    np.testing.assert_array_equal(cut, np.rint(colours / 16))
    eight = encode(NOISE, "PNG")  # 8-bit images are unchanged
    np.testing.assert_array_equal(decode.decode(decode.ruled(eight, decode.Rules("image"))), NOISE)


def test_floats_are_cut_to_the_range():
    floats = np.array([[0.0, 0.5, 1.0, np.nan]], np.float32)
    encoded = encode(Image.fromarray(floats), "TIFF")
    cut = decode.decode(decode.ruled(encoded, decode.Rules((0.0, 1.0))))
    assert cut[0, :, 0].tolist() == [0, 128, 255, 0]
    flat = encode(np.full((2, 2), 700, np.uint16), "PNG")
    assert not decode.decode(decode.ruled(flat, decode.Rules("image"))).any()


@pytest.mark.parametrize("setting", ["half", "1", "5,1", "0,inf", "a,b", "1,2,3", 7])
def test_a_range_that_is_none_is_refused(setting):
    with pytest.raises(UserError, match=r"config\.data\.range"):
        decode.Rules.parse(setting, decode.MAX_PIXELS)
    with pytest.raises(UserError, match=r"config\.data\.max_pixels=0"):
        decode.Rules.parse("full", 0)


# ---- sizes


def test_plain_resizing_is_that_of_floats():
    """Compares with torch's interpolate without antialias; OpenCV computes with 11 bits."""
    meta, stored = helpers.fixture("augment/resized_crop_a")
    for i, p in enumerate(meta["params"]):
        cut = stored["image"][p["top"] : p["top"] + p["height"], p["left"] : p["left"] + p["width"]]
        resized = decode.resize(cut, p["size"], p["size"], p["interpolation"], "none")
        if p["interpolation"] == "bilinear":
            assert np.abs(resized - 255 * stored[f"crop{i}_float"]).max() < 1.01


def test_area_takes_the_mean_of_what_a_pixel_covers():
    image = RNG.integers(0, 256, (12, 20, 3), np.uint8)
    resized = decode.resize(image, 4, 5, "bilinear", "area")
    want = image.reshape(4, 3, 5, 4, 3).mean(axis=(1, 3))
    assert np.abs(resized - want).max() <= 0.51
    larger = decode.resize(image, 24, 10, "bicubic", "area")  # enlarged on one side
    np.testing.assert_array_equal(larger, decode.resize(image, 24, 10, "bicubic", "none"))


def test_grey_images_keep_one_channel():
    for antialias in ("exact", "area", "none"):
        for size in (30, 7, 60):
            resized = decode.resize(NOISE[:30, :30, 0], size, size, "bilinear", antialias)
            assert resized.shape == (size, size, 1)


def photograph(scale):
    """Returns the fixture's photograph, enlarged to the size of a camera image."""
    _, stored = helpers.fixture("augment/resized_crop_a")
    photo = Image.fromarray(stored["image"])
    return photo.resize((photo.width * scale, photo.height * scale), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("antialias", ["exact", "area", "none"])
def test_large_jpegs_are_decoded_small_and_look_the_same(tmp_path, monkeypatch, antialias):
    file = tmp_path / "large.jpg"
    photograph(8).save(file, quality=95)
    views = {
        0: crop(32, scale=(0.5, 1.0), antialias=antialias),
        1: crop(16, scale=(0.2, 0.5), antialias=antialias),
    }
    factors, jpeg = [], decode._jpeg
    monkeypatch.setattr(
        decode, "_jpeg", lambda e, factor: (factors.append(factor), jpeg(e, factor))[1]
    )
    (small,) = decode.crops_of([file], views, (0, 0, 0), 5)
    monkeypatch.setattr(decode, "_JPEG_REDUCTIONS", ())
    (whole,) = decode.crops_of([file], views, (0, 0, 0), 5)
    assert factors[0] > 1 and factors[1] == 1
    for a, b in zip(small, whole, strict=True):
        difference = np.abs(a.astype(int) - b.astype(int))
        # In the reduced image, "area" and "none" crop at the nearest integer pixel.
        assert difference.mean() < {"exact": 2, "area": 3, "none": 8}[antialias]
        assert (a != b).any()


def test_crops_are_never_enlarged_by_decoding_small():
    """The narrowest crop decides: its box must keep at least the crop's size in pixels."""
    crop_boxes = [(0, 0, 100, 400), (0, 0, 60, 60)]
    assert decode._jpeg_reduction(crop_boxes, {0: crop(48), 1: crop(16)}) == 2
    assert decode._jpeg_reduction(crop_boxes, {0: crop(16), 1: crop(8)}) == 4
    assert decode._jpeg_reduction(crop_boxes, {0: crop(101), 1: crop(8)}) == 1
