"""Parity of the crop sampler with torchvision's loop and of batched resizing with Pillow."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import helpers
from disco_jax.data import crops, decode

# (height, width, scale, ratio); the last three use the fallback often or always.
CASES = [
    (375, 500, (0.2, 1.0), (3 / 4, 4 / 3)),
    (8, 8, (0.08, 1.0), (3 / 4, 4 / 3)),
    (500, 375, (0.05, 0.14), (3 / 4, 4 / 3)),
    (250, 600, (0.35, 1.0), (3 / 4, 4 / 3)),
    (600, 100, (0.9, 1.0), (3 / 4, 4 / 3)),
    (100, 600, (0.9, 1.0), (3 / 4, 4 / 3)),
]


def get_params(draws, height, width, scale, ratio):
    """Computes torchvision's RandomResizedCrop.get_params from numbers in [0, 1)."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, aspect_draw in draws[: crops.TRIES]:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * float(area_draw))
        aspect = math.exp(low + (high - low) * float(aspect_draw))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            offsets = draws[crops.TRIES]
            return int(offsets[0] * (height - h + 1)), int(offsets[1] * (width - w + 1)), h, w
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        h, w = height, round(height * ratio[1])
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width", "scale", "ratio"), CASES)
def test_boxes_are_those_of_torchvisions_loop(height, width, scale, ratio):
    draws = crops.uniforms(5, 1, 0, 0, 0, 500)
    boxes = crops.boxes(draws, np.full(500, height), np.full(500, width), scale, ratio)
    want = [get_params(row, height, width, scale, ratio) for row in draws]
    np.testing.assert_array_equal(boxes, want)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_batched_crops_equal_pillows(data):
    side = data.draw(st.integers(1, 40), "side"), data.draw(st.integers(1, 40), "side")
    size = data.draw(st.integers(1, 40), "size")
    h, w = (data.draw(st.integers(1, s), "length") for s in side)
    top, left_edge = (data.draw(st.integers(0, s - n)) for s, n in zip(side, (h, w), strict=True))
    seed = data.draw(st.integers(0, 9))
    image = np.random.default_rng(seed).integers(0, 256, (1, *side, 3), np.uint8)
    batched = crops.cut(image, np.array([[top, left_edge, h, w]]), size, "bilinear", True)[0]
    cut = Image.fromarray(image[0, top : top + h, left_edge : left_edge + w])
    want = np.asarray(cut.resize((size, size), Image.Resampling.BILINEAR))
    assert np.abs(batched.astype(int) - want).max() <= 1


def test_batched_and_single_crops_equal_those_on_pictures():
    """Pillow rounds between its two passes: by one grey level, or more where bicubic overshoots."""
    meta, stored = helpers.fixture("augment/resized_crop_a")
    for i, p in enumerate(meta["params"]):
        box = p["top"], p["left"], p["height"], p["width"]
        interpolation, size = p["interpolation"], p["size"]
        batched = crops.cut(stored["image"][None], np.array([box]), size, interpolation, True)
        top, left_edge, h, w = box
        single = decode.resize(
            stored["image"][top : top + h, left_edge : left_edge + w], size, size, interpolation
        )
        for resized in (batched[0], single):
            difference = np.abs(resized.astype(int) - stored[f"crop{i}_pil"])
            assert difference.max() <= (4 if p["interpolation"] == "bicubic" else 1)
            assert difference.mean() < 0.3


def test_crops_of_a_batch_do_not_depend_on_each_other():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 20, 24, 3), np.uint8)
    places = crops.boxes(
        crops.uniforms(0, 0, 0, 0, 0, 9), np.full(9, 20), np.full(9, 24), (0.1, 1.0), (0.5, 2.0)
    )
    whole = crops.cut(images, places, 16, "bicubic", True)
    for i in range(9):
        one = crops.cut(images[i : i + 1], places[i : i + 1], 16, "bicubic", True)
        assert np.abs(whole[i].astype(int) - one[0]).max() <= 1
