"""The in-memory source: order, resuming, hosts, and parity with Pillow."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from disco_jax.data import arrays, crops, decode
from disco_jax.data.arrays import ArraySource
from disco_jax.data.contract import Position
from disco_jax.data.seeds import seed_words
from disco_jax.errors import UserError
from helpers import crop, same_batches

START = Position.start()
ROOT = pathlib.Path(__file__).parents[2]


VIEWS = {0: crop(), 1: crop(6, scale=(0.05, 0.5), interpolation="bicubic")}


def numbered(n=40, side=12):
    """Makes images whose pixels equal their index, so that a crop identifies its record."""
    return np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None], (n, side, side))


def noise(n=40, side=12, channels=3):
    return np.random.default_rng(0).integers(0, 256, (n, side, side, channels), np.uint8)


def train(source, n, batch_size=7, seed=3, start=START, views=VIEWS):
    batches = source.train("train", views, batch_size, seed, start, 0)
    return list(itertools.islice(batches, n))


def load(parity, name):
    path = parity / "augment" / name
    return json.loads(path.with_suffix(".json").read_text())["params"], np.load(f"{path}.npz")


@pytest.mark.parametrize("host", [0, 1])
def test_reading_on_from_any_position_repeats_the_rest(host):
    source = ArraySource({"train": (noise(), None)}, process_index=host, process_count=2)
    whole = train(source, 9)
    assert [b.position.epoch for b in whole] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    for i, batch in enumerate(whole[:-1]):
        same_batches(train(source, 8 - i, start=batch.position), whole[i + 1 :])


def test_batches_have_the_promised_layout():
    for images in (noise(channels=3), noise(channels=1), noise(channels=1)[..., 0]):
        source = ArraySource({"train": (images, None)})
        for batch in train(source, 2):
            assert batch.aux == {}
            assert {v: x.shape for v, x in batch.views.items()} == {
                0: (7, 8, 8, 3),
                1: (7, 6, 6, 3),
            }
            assert all(x.dtype == np.uint8 for x in batch.views.values())


def test_labels_come_with_their_images():
    images = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None], (20, 9, 9))
    source = ArraySource({"train": (images, np.arange(20) + 3), "bare": (images, None)})
    for batch in train(source, 4):
        np.testing.assert_array_equal(batch.labels, batch.views[0][:, 0, 0, 0].astype(int) + 3)
    bare = next(source.train("bare", VIEWS, 7, 0, Position.start(), 0))
    assert (bare.labels == -1).all() and bare.labels.dtype == np.int32


def test_the_seed_decides_order_and_crops():
    source = ArraySource({"train": (noise(), None)})
    same_batches(train(source, 6), train(source, 6))
    for a, b in zip(train(source, 6), train(source, 6, seed=4), strict=True):
        assert (a.views[0] != b.views[0]).any()


def test_views_of_equal_settings_differ():
    source = ArraySource({"train": (noise(), None)})
    batch = train(source, 1, views={0: crop(), 1: crop()})[0]
    assert (batch.views[0] != batch.views[1]).any()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_an_epoch_without_repeats(hosts):
    records_by_epoch = {0: [], 1: []}
    for host in range(hosts):
        source = ArraySource(
            {"train": (numbered(40), None)}, process_index=host, process_count=hosts
        )
        per_epoch = 40 // hosts // 5
        batches = train(source, 2 * per_epoch, batch_size=5)
        for i, batch in enumerate(batches):
            np.testing.assert_array_equal(batch.views[0][:, 0, 0, 0], batch.views[1][:, 0, 0, 0])
            records_by_epoch[i // per_epoch] += batch.views[0][:, 0, 0, 0].tolist()
    assert sorted(records_by_epoch[0]) == sorted(records_by_epoch[1]) == list(range(40))
    assert records_by_epoch[0] != records_by_epoch[1]


def test_a_batch_larger_than_a_share_is_refused():
    source = ArraySource({"train": (noise(10), None)}, process_index=0, process_count=2)
    with pytest.raises(UserError, match="between 1 and 5"):
        train(source, 1, batch_size=6)


def test_unknown_splits_and_filters_are_named():
    source = ArraySource({"train": (noise(), None)})
    with pytest.raises(UserError, match="Did you mean 'train'"):
        source.count("trian")
    with pytest.raises(UserError, match="bicubic"):
        train(source, 1, views={0: crop(interpolation="cubic")})


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((3, 4, 4), np.float32), None, "float32"),
        (np.zeros((3, 4, 4, 2), np.uint8), None, r"\(4, 4, 2\)"),
        (np.zeros((0, 4, 4), np.uint8), None, "no images"),
        (np.zeros((3, 4, 4), np.uint8), [0, 1], "3 images"),
        (np.zeros((3, 4, 4), np.uint8), [0.0, 1.0, 2.0], "must be integers"),
    ],
)
def test_wrong_arrays_are_refused(images, labels, message):
    with pytest.raises(UserError, match=message):
        ArraySource({"train": (images, labels)})


# ---- crops


@pytest.mark.parametrize("case", range(4))
def test_boxes_are_distributed_as_torchvisions(parity, case):
    params, stored = load(parity, "random_resized_crop_a")
    want, m = params[case], 40_000
    sides = np.full(m, want["height"]), np.full(m, want["width"])
    draws = crops.uniforms(0, 0, 0, 0, 0, m)
    top, left_edge, h, w = crops.boxes(draws, *sides, want["scale"], want["ratio"]).T
    assert (top >= 0).all() and (left_edge >= 0).all()
    assert (top + h <= want["height"]).all() and (left_edge + w <= want["width"]).all()
    area, log_ratio = h * w / (sides[0] * sides[1]), np.log(w / h)
    tolerance = 4 / np.sqrt(m)
    assert abs(area.mean() - want["area_mean"]) < tolerance * want["area_std"]
    assert abs(log_ratio.mean() - want["log_ratio_mean"]) < tolerance * want["log_ratio_std"]
    for name, values in (("area", area), ("log_ratio", log_ratio)):
        edges, expected = stored[f"case{case}/{name}_edges"], stored[f"case{case}/{name}_hist"]
        histogram = np.histogram(values, edges)[0] / m
        spread = np.sqrt(np.maximum(expected, 1 / m) * (1 / m + 1 / 200_000))
        assert (np.abs(histogram - expected) < 5 * spread).all()
    movable = h < want["height"]
    relative = (top / (sides[0] - h + 1e-9))[movable]
    assert abs(relative.mean() - want["relative_top_mean"]) < 0.02


def test_a_box_depends_on_its_position_alone():
    whole = crops.uniforms(1, 2, 0, 1, 0, 50)
    np.testing.assert_array_equal(crops.uniforms(1, 2, 0, 1, 13, 20), whole[13:33])
    assert len(np.unique(whole)) == whole.size
    for other in ((2, 2, 0, 1), (1, 3, 0, 1), (1, 2, 1, 1), (1, 2, 0, 0)):
        assert (crops.uniforms(*other, 0, 50) != whole).all()


@pytest.mark.parametrize("sides", [(1, 1), (1, 300), (300, 1), (3, 2)])
def test_boxes_lie_inside_the_smallest_images(sides):
    draws = crops.uniforms(0, 0, 0, 0, 0, 500)
    height, width = (np.full(500, side) for side in sides)
    top, left_edge, h, w = crops.boxes(draws, height, width, (0.08, 1.0), (3 / 4, 4 / 3)).T
    assert (h >= 1).all() and (w >= 1).all() and (top >= 0).all() and (left_edge >= 0).all()
    assert (top + h <= sides[0]).all() and (left_edge + w <= sides[1]).all()


def test_crops_equal_torchvisions(parity):
    """Bit-exact, except that a newer Pillow runs the two passes in the other order.

    It then clips the overshoot of a bicubic filter before the second pass instead of after it.
    """
    params, stored = load(parity, "resized_crop_a")
    for i, p in enumerate(params):
        rows, columns = (
            slice(p["top"], p["top"] + p["height"]),
            slice(p["left"], p["left"] + p["width"]),
        )
        cut = stored["image"][rows, columns]
        resized = decode.resize(cut, p["size"], p["size"], p["interpolation"])
        difference = np.abs(resized.astype(int) - stored[f"crop{i}_pil"])
        assert difference.max() <= (4 if p["interpolation"] == "bicubic" else 0)
        assert difference.mean() < 0.3


def test_crops_of_a_whole_batch_equal_torchvisions(parity):
    """Compares with float crops that are rounded once at the end."""
    params, stored = load(parity, "resized_crop_a")
    for i, p in enumerate(params):
        box = np.array([[p["top"], p["left"], p["height"], p["width"]]])
        resized = crops.cut(stored["image"][None], box, p["size"], p["interpolation"], True)[0]
        want = np.clip(255 * stored[f"crop{i}_float_antialias"], 0, 255)
        assert np.abs(resized - want).max() < 0.501
        if p["interpolation"] == "bilinear":
            resized = crops.cut(stored["image"][None], box, p["size"], "bilinear", False)[0]
            assert np.abs(resized - 255 * stored[f"crop{i}_float"]).max() < 0.501


# ---- evaluation


def test_evaluation_equals_torchvisions(parity):
    params, stored = load(parity, "eval_a")
    for i, p in enumerate(params):
        evaluated = decode.evaluated(stored["image"], p["crop"], p["resize"], p["interpolation"])
        np.testing.assert_array_equal(evaluated, stored[f"eval{i}_pil"])


def test_evaluation_reads_everything_once_in_order():
    labels = np.arange(10) % 3
    source = ArraySource({"train": (numbered(5), None), "test": (numbered(10), labels)})
    assert source.num_classes == 3 and source.count("test") == 10
    batches = list(source.evaluate("test", 8, 0, "bilinear", 4))
    assert [b["mask"].sum() for b in batches] == [4, 4, 2]
    assert all(b["image"].shape == (4, 8, 8, 3) and b["label"].dtype == np.int32 for b in batches)
    mask = np.concatenate([b["mask"] for b in batches])
    assert np.concatenate([b["image"] for b in batches])[mask][:, 0, 0, 0].tolist() == [*range(10)]
    assert np.concatenate([b["label"] for b in batches])[mask].tolist() == labels.tolist()
    assert [b["label"].tolist() for b in source.evaluate("train", 8, 10, "bicubic", 5)] == [
        [-1] * 5
    ]
    with pytest.raises(UserError, match="smaller than the crop"):
        source.evaluate("test", 8, 7, "bilinear", 4)


@pytest.mark.parametrize(("hosts", "limit"), [(1, 0), (3, 0), (4, 0), (1, 5), (3, 5), (4, 2)])
def test_hosts_evaluate_everything_in_as_many_batches(hosts, limit):
    records, batches = [], set()
    for host in range(hosts):
        source = ArraySource(
            {"test": (numbered(10), None)}, process_index=host, process_count=hosts
        )
        host_batches = list(source.evaluate("test", 8, 0, "bilinear", 2, limit))
        batches.add(len(host_batches))
        records += [i for b in host_batches for i in b["image"][b["mask"]][:, 0, 0, 0].tolist()]
    assert len(batches) == 1
    assert len(records) == len(set(records)) == (limit or 10)


# ---- files


def test_npz(tmp_path):
    path = tmp_path / "ours.npz"
    np.savez(path, train_images=noise(6), train_labels=np.arange(6), test_images=noise(3, 9, 1))
    source = ArraySource.from_npz(path)
    assert (source.name, source.num_classes) == ("ours", 6)
    assert (source.count("train"), source.count("test")) == (6, 3)
    with pytest.raises(UserError, match="no file"):
        ArraySource.from_npz(tmp_path / "none.npz")
    path.write_bytes(b"not a zip file")
    with pytest.raises(UserError, match="cannot be read"):
        ArraySource.from_npz(path)
    np.savez(path, images=noise(6))
    with pytest.raises(UserError, match="train_images"):
        ArraySource.from_npz(path)


def test_large_images_are_cropped_in_threads_to_the_same_bytes(monkeypatch):
    source = ArraySource({"train": (noise(6, 100), None)})
    threaded = train(source, 2, batch_size=3, views={0: crop(64)})
    monkeypatch.setattr(arrays, "_MIN_THREADED_PIXELS", 10**9)
    same_batches(train(source, 2, batch_size=3, views={0: crop(64)}), threaded)


def test_tensorflow_is_not_needed(tmp_path):
    code = """
import sys
sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None
import types, numpy as np
from disco_jax.data import pipeline
from disco_jax.data.data_settings import DataSettings
from disco_jax.data.contract import Position
np.savez("ours.npz", train_images=np.zeros((8, 6, 6), np.uint8))
source = pipeline.open_source(DataSettings(source="npz", dir="ours.npz"))
crop = types.SimpleNamespace(
    size=4, scale=(0.2, 1.0), ratio=(0.75, 1.33), interpolation="bilinear", antialias="exact")
print(next(source.train("train", {0: crop}, 4, 0, Position.start(), 0)).position)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "Position(epoch=0, offset=4)" in process.stdout


def test_seeds_may_be_any_whole_numbers():
    words = seed_words(-1, 2**70, 3, words=4)
    assert words.shape == (4,) and words.dtype == np.uint64
    assert (words == seed_words(-1, 2**70, 3, words=4)).all()


@pytest.mark.parametrize(
    "images, labels, says",
    [
        (np.zeros((2, 3, 3), np.uint8), [2**40, 0], r"the label 1099511627776; labels must lie"),
        (np.zeros((2, 3, 3), np.uint8), [0, -5], "the label -5; labels must lie in 0 to"),
        (np.zeros((2, 3, 3), np.uint8), np.zeros((2, 14), np.int64), r"of type int64 and shape"),
        (np.zeros((2, 0, 3), np.uint8), [0, 1], r"shape \(0, 3\), which has no pixels"),
        (np.uint8(7), [0], "is a single number, not an array"),
        (np.zeros((2, 3, 3), np.uint8), 1, r"shape \(\); labels must be integers"),
        (np.zeros(2, np.uint8), [0, 1], r"shape \(\); images must be uint8"),
    ],
)
def test_arrays_that_are_no_images_or_labels_are_refused_in_one_sentence(
    tmp_path, images, labels, says
):
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels)
    with pytest.raises(UserError, match=says) as error:
        ArraySource.from_npz(tmp_path / "a.npz")
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_labels_in_a_column_are_taken_and_other_arrays_named(tmp_path):
    """The layout of MedMNIST's files."""
    images, labels = np.zeros((3, 4, 4), np.uint8), np.array([[2], [0], [1]], np.uint8)
    np.savez(tmp_path / "a.npz", val_images=images, val_labels=labels, x_train=images)
    source = ArraySource.from_npz(tmp_path / "a.npz")
    assert [label for *_, label in source.iter_images("val")] == [2, 0, 1]
    assert source.num_classes == 3
    assert source.skipped.lines() == ["1 named neither SPLIT_images nor SPLIT_labels: x_train"]
