"""Images that cannot be decoded: counted over restarts, and allowed up to a share of all images."""

import itertools
import json
import logging

import numpy as np
import pytest
from PIL import Image

import helpers
from disco_jax.data import contract, pipeline
from disco_jax.data.contract import Position
from disco_jax.data.folders import FolderSource
from disco_jax.data.skips import UnreadableNames
from disco_jax.errors import UserError
from disco_jax.run import unreadable
from disco_jax.train.experiment import parse
from disco_jax.workflows import pretrain
from helpers import crop


def pictures(folder, good, bad):
    """Writes `good` valid and `bad` invalid PNG files to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    for i in range(good):
        image = noise.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(image).save(folder / f"good_{i}.png")
    for i in range(bad):
        (folder / f"bad_{i}.png").write_bytes(b"no")
    return folder


def read(source, limit, batches=4):
    iterator = source.train("train", {0: crop()}, 2, 0, Position.start(), limit)
    return list(itertools.islice(iterator, batches))


def test_names_of_earlier_starts_count(tmp_path):
    first = FolderSource(pictures(tmp_path / "photos", good=6, bad=2))
    unreadable.keep(first, tmp_path)
    assert not (tmp_path / "unreadable.jsonl").exists()
    read(first, limit=3)
    names = (tmp_path / "unreadable.jsonl").read_text().splitlines()
    assert sorted(json.loads(name).split()[0] for name in names) == ["bad_0.png", "bad_1.png"]

    again = FolderSource(tmp_path / "photos")
    unreadable.keep(again, tmp_path)
    assert again.unreadable == first.unreadable
    read(again, limit=3)  # known names are not counted again
    assert len(again.unreadable) == 2

    for name in ("bad_0.png", "bad_1.png"):  # repairs these and damages two others
        Image.new("RGB", (16, 16)).save(tmp_path / "photos" / name)
    for name in ("good_0.png", "good_1.png"):
        (tmp_path / "photos" / name).write_bytes(b"")
    later = FolderSource(tmp_path / "photos")
    unreadable.keep(later, tmp_path)
    with pytest.raises(UserError, match=r"4 records .* more than 3 .*unreadable\.jsonl keeps"):
        read(later, limit=3)


def test_a_damaged_file_of_names_is_read_as_far_as_it_can_be(tmp_path):
    (tmp_path / "names").write_bytes(b'"a.png (cut)"\n\n{"b"\n7\n"caf\\udce9.png"\n"a.png (cut)"\n')
    names = UnreadableNames()
    names.keep_in(tmp_path / "names")
    assert names == ["a.png (cut)", "caf\udce9.png"]
    names.append("b.png")
    again = UnreadableNames(["c.png"])
    again.keep_in(tmp_path / "names")
    assert again == ["c.png", "a.png (cut)", "caf\udce9.png", "b.png"]


@pytest.mark.parametrize(
    "count, least, percent, limit",
    [(1_281_167, 10, 1.0, 12_811), (500, 10, 1.0, 10), (500, 10, 50.0, 250), (9, 0, 1.0, 0)],
)
def test_the_limit_is_a_share_with_a_floor(count, least, percent, limit):
    assert contract.unreadable_limit(count, least, percent) == limit


def test_evaluations_have_the_limit_of_their_split(tmp_path):
    folder = pictures(tmp_path, good=8, bad=2)
    source = FolderSource(folder, max_unreadable_percent=20)
    assert sum(b["mask"].sum() for b in source.evaluate("train", 8, 0, "bilinear", 5)) == 8
    with pytest.raises(UserError, match="more than 1 "):
        list(FolderSource(folder, max_unreadable_percent=19).evaluate("train", 8, 0, "bilinear", 5))


@pytest.mark.wiring  # compares log lines and files, no numbers
def test_a_run_tells_of_its_data_and_keeps_what_it_cannot_read(tmp_path, caplog):
    photos = pictures(tmp_path / "photos" / "train" / "cat", good=16, bad=1).parents[1]
    pictures(photos / "Test" / "cat", good=2, bad=0)
    (photos / "train" / "notes.txt").write_text("x")
    for file in sorted((photos / "train" / "cat").glob("good_*")):
        dark = np.asarray(Image.open(file)) // 16
        Image.fromarray(dark).save(file)
    changes = {"student.backbone": "tiny", "batch_size": 8, "total_steps": 4}
    config = helpers.smoke_config("moco_v2", **changes)
    config.data.update(source="folder", dir=str(photos), name="photos")
    data = parse(config).data
    source = pipeline.open_source(data)
    assert pipeline.unreadable_limit(data, source, "train") == 10
    with helpers.tiny_backbone(), caplog.at_level(logging.INFO):
        pretrain.run(config, str(tmp_path / "run"))
    messages = [m for m in caplog.messages if m.startswith(("photos: ", "The images of photos"))]
    assert messages[:3] == [
        "photos: images: test 2, train 17; 1 classes (cat).",
        "photos: not used: 1 with suffix .txt: train/notes.txt",
        "The images of photos are nearly black: the brightest value is 15 of 255. If they have 10 "
        "to 16 bits, set config.data.range to 'image' or to their lowest and highest value, as in "
        "'0,4095'.",
    ]
    (name,) = (tmp_path / "run" / "unreadable.jsonl").read_text().splitlines()
    assert json.loads(name).startswith("train/cat/bad_0.png (")
