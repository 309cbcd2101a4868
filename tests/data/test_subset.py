"""Subsets of a split: exactly the selected records, for every kind of source."""

import itertools

import numpy as np
import pytest
from PIL import Image

from disco_jax.data.arrays import ArraySource
from disco_jax.data.contract import Position
from disco_jax.data.folders import FolderSource
from disco_jax.data.subset import SubsetSource, read_labels
from disco_jax.data.views import Crop

ROWS = (2, 5, 7, 11)
WHOLE = {0: Crop(8, (1.0, 1.0), (1.0, 1.0), "bilinear", "exact")}


@pytest.fixture(params=["folder", "arrays"])
def source(request, tmp_path):
    """Twelve grey images of levels 0, 10, 20, ...; the first six are class 0, the rest class 1."""
    levels = [np.full((12, 14), 10 * i, np.uint8) for i in range(12)]
    if request.param == "arrays":
        half = np.stack(levels), np.arange(12) // 6
        return ArraySource({"train": half, "test": half})
    for split in ("train", "test"):
        for i, level in enumerate(levels):
            folder = tmp_path / split / str(i // 6)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(level).save(folder / f"{i:02}.png")
    return FolderSource(tmp_path)


def test_the_chosen_are_read_each_once_an_epoch_and_by_one_host(source):
    assert read_labels(source, "train").tolist() == [0] * 6 + [1] * 6
    records = []
    for host in (0, 1):
        subset = SubsetSource(source, "train", ROWS, process_index=host, process_count=2)
        assert subset.count("train") == 4 and subset.splits == source.splits
        batches = subset.train("train", WHOLE, 1, 0, Position.start(), 0)
        for batch in itertools.islice(batches, 2):
            records.append(int(batch.views[0][0, 0, 0, 0]) // 10)
            assert batch.labels == [records[-1] // 6]
    assert sorted(records) == list(ROWS)


def test_evaluation_is_in_order_and_other_splits_stay_whole(source):
    subset = SubsetSource(source, "train", ROWS)
    for split, expected in (("train", list(ROWS)), ("test", list(range(12)))):
        batches = list(subset.evaluate(split, 8, 0, "bilinear", 5))
        levels = np.concatenate([b["image"][b["mask"]][:, 0, 0, 0] for b in batches]) // 10
        assert levels.tolist() == expected
        labels = np.concatenate([b["label"][b["mask"]] for b in batches])
        assert labels.tolist() == [n // 6 for n in expected]
    assert [label for *_, label in subset.iter_images("train")] == [0, 0, 1, 1]


def test_any_records_of_a_split_in_any_order(source):
    """Covers a source and a subset of it."""
    for any_source in (source, SubsetSource(source, "train", ROWS)):
        for split in ("train", "test"):
            whole, rows = list(any_source.iter_images(split)), [3, 0, 3, 1]
            for (name, image, label), row in zip(any_source.take(split, rows), rows, strict=True):
                assert (name, label) == (whole[row][0], whole[row][2])
                np.testing.assert_array_equal(image, whole[row][1])


@pytest.mark.parametrize("source", ["folder"], indirect=True)
def test_unreadable_records_count_with_those_of_the_source(source, tmp_path):
    file = next(tmp_path.glob("train/**/*.png"))
    file.write_bytes(b"no")
    subset = SubsetSource(source, "train", range(4))
    assert sum(b["mask"].sum() for b in subset.evaluate("train", 8, 0, "bilinear", 4)) == 3
    assert [name.split(" (")[0] for name in source.unreadable] == [str(file.relative_to(tmp_path))]
