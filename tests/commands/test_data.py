"""The command `disco-jax data`: reports, messages and copies."""

import json

import numpy as np
import pytest
from PIL import Image

import helpers
from disco_jax import main
from disco_jax.commands import data
from disco_jax.data import digits
from disco_jax.data.arrays import ArraySource
from disco_jax.errors import UserError


@pytest.fixture
def photos(tmp_path):
    """A folder with two classes of images of several sizes, one of them an empty file."""
    for name, count in (("cat", 3), ("dog", 1)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (300, 20 * (i + 1)), "red").save(
                tmp_path / "photos" / name / f"{i}.png"
            )
    (tmp_path / "photos" / "dog" / "empty.jpg").write_bytes(b"")
    return tmp_path / "photos"


def test_a_folder_is_counted_and_measured(photos, tmp_path, capsys):
    output = tmp_path / "report.json"
    assert main.main(["data", str(photos), "--seconds=0.2", f"--output={output}"]) == 0
    report = json.loads(output.read_text())
    assert (report["name"], report["classes"]) == ("photos", 2)
    assert report["splits"] == {
        "train": {
            "images": 5,
            "read": 5,
            "labelled": 5,
            "classes_seen": 2,
            "per_class": [2, 3],
            "sides": {"1": 2, "32": 2},
            "unreadable": ["dog/empty.jpg"],
        }
    }
    assert report["images_per_s"] > 0
    out = capsys.readouterr().out
    for part in ("2 to 3 in each of 2 classes, 1 unreadable", "1 to 31 px: 2", "dog/empty.jpg"):
        assert part in out, part


def test_a_list_of_training_images_is_checked(photos, tmp_path, capsys):
    listed = tmp_path / "few.txt"
    listed.write_text("1.png\n2.png\n")
    report = data.run(str(photos), subset=str(listed), seconds=0)
    assert report["splits"]["train"]["per_class"] == [2, 2]
    listed.write_text("1.png\nnone.png\n")
    assert main.main(["data", str(photos), f"--subset={listed}"]) == 2
    assert "1 of 2 file names of config.data.subset" in capsys.readouterr().err


def test_a_prepared_data_set_and_an_npz_file_are_read_too(tmp_path):
    digits.write(str(tmp_path))
    report = data.run("digits", data_dir=str(tmp_path), limit=100, seconds=0)
    assert report["images_per_s"] is None and report["classes"] == 10
    assert report["splits"]["train"]["images"] == 1437 and report["splits"]["train"]["read"] == 100
    assert report["splits"]["test"]["sides"] == {"1": 100}
    folder = next((tmp_path / "digits").glob("*/dataset_info.json")).parent
    assert data.run(str(folder), limit=3, seconds=0)["splits"]["test"]["read"] == 3
    np.savez(tmp_path / "a.npz", **helpers.digits())
    assert data.run(str(tmp_path / "a.npz"), seconds=0.1)["splits"]["test"]["labelled"] == 360


def test_images_of_one_size_are_copied_for_a_machine_without_tensorflow(tmp_path, capsys):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (6, 5, 5, 1), np.uint8)
    for i, image in enumerate(grey):
        name = tmp_path / "photos" / "train" / str(i % 2) / f"{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(name)
    copy = tmp_path / "copy.npz"
    data.run(str(tmp_path / "photos"), seconds=0, npz=str(copy))
    assert f"--config.data.dir={copy}" in capsys.readouterr().out
    source = ArraySource.from_npz(copy)
    by_label = [grey[0], grey[2], grey[4], grey[1], grey[3], grey[5]]
    images, labels = zip(
        *((image, label) for _, image, label in source.iter_images("train")), strict=True
    )
    np.testing.assert_array_equal(images, np.squeeze(by_label))
    assert labels == (0, 0, 0, 1, 1, 1)
    Image.fromarray(np.zeros((7, 5), np.uint8)).save(tmp_path / "photos" / "train" / "1" / "9.png")
    with pytest.raises(UserError, match=r"images of one size; those of train have"):
        data.run(str(tmp_path / "photos"), seconds=0, npz=str(tmp_path / "other.npz"))
    (tmp_path / "photos" / "train" / "1" / "9.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"9\.png is unreadable"):
        data.run(str(tmp_path / "photos"), seconds=0, npz=str(tmp_path / "other.npz"))
    assert not (tmp_path / "other.npz").exists()


def test_nothing_readable_is_reported_not_raised(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no")
    report = data.run(str(tmp_path), seconds=0.1)
    assert len(report["splits"]["train"]["unreadable"]) == 3 and report["images_per_s"] is None


@pytest.mark.parametrize(
    "words, message",
    [
        (["imagenet2012", "--data-dir={here}"], "ILSVRC2012_img_train.tar"),
        (["{here}"], "has no images"),
        (["{here}/*.png"], "matches no images"),
        (["{here}", "--output=a.txt"], "should end in .json"),
        (["{here}", "--npz=a.npy"], "should end in .npz"),
        (["{here}", "--limit=-1"], "must not be below 0"),
        (["{here}", "--limits=1"], "Did you mean '--limit'"),
    ],
)
def test_what_cannot_be_checked_is_told(tmp_path, words, message, capsys):
    assert main.main(["data", *(w.format(here=tmp_path) for w in words)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_used_is_counted_and_named(photos, tmp_path, capsys):
    (photos / "notes.txt").write_text("x")
    (photos / "cat" / "caf\udce9.doc").write_text("x")
    output = tmp_path / "report.json"
    assert main.main(["data", str(photos), "--seconds=0", f"--output={output}"]) == 0
    report = json.loads(output.read_text())
    assert report["not_used"] == {
        "with suffix .doc": {"count": 1, "names": [r"cat/caf\xe9.doc"]},
        "with suffix .txt": {"count": 1, "names": ["notes.txt"]},
    }
    assert report["class_names"] == ["cat", "dog"] and report["brightest"] == 255
    out = capsys.readouterr().out
    for part in ("2 classes (cat, dog)", "not used: 1 with suffix .txt: notes.txt"):
        assert part in out, part
    assert "nearly black" not in out


def test_twelve_bits_are_warned_of_and_read_with_a_range(tmp_path, capsys):
    scans = tmp_path / "scans"
    scans.mkdir()
    for i in range(3):
        deep = np.linspace(0, 4080, 20).astype(np.uint16).reshape(4, 5)
        Image.fromarray(deep).save(scans / f"{i}.png")
    assert main.main(["data", str(scans), "--seconds=0"]) == 0
    assert "nearly black: the brightest value is 15 of 255" in capsys.readouterr().out
    words = [str(scans), "--seconds=0", "--range=0,4080", f"--npz={tmp_path / 'copy.npz'}"]
    assert main.main(["data", *words]) == 0
    assert "nearly black" not in capsys.readouterr().out
    with np.load(tmp_path / "copy.npz") as copied:
        assert copied["train_images"].max() == 255


def test_questions_are_answered_on_the_command_line(tmp_path, capsys):
    for name in ("train/1.png", "bus/2.png", "test/3.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "test").rename(tmp_path / "photos" / "tests")
    labels = tmp_path / "labels.csv"
    labels.write_text("1.png,7\n")
    words = ["data", str(tmp_path / "photos"), "--seconds=0"]
    assert main.main(words) == 2
    assert "config.data.splits='train=train' if this is the split" in capsys.readouterr().err
    assert main.main([*words, "--splits=train=train,test=tests", f"--labels={labels}"]) == 0
    out = capsys.readouterr().out
    assert "train: 1 images, 1 to 1 in each of 1 classes" in out
    assert "not used: 1 outside the splits: bus/2.png" in out
