"""Folders of images: names, formats, order, resuming, hosts, damage, and parity with Pillow."""

import itertools
import logging
import tarfile

import numpy as np
import pytest
from PIL import Image

from disco_jax.data import encoded
from disco_jax.data.arrays import ArraySource
from disco_jax.data.contract import Position
from disco_jax.data.folders import FolderSource
from disco_jax.errors import UserError
from helpers import crop, same_batches

START = Position.start()


VIEWS = {0: crop(), 1: crop(6, scale=(0.05, 0.5), interpolation="bicubic")}


def train(source, n, batch_size=7, seed=3, start=START, views=VIEWS, max_unreadable=0):
    batches = source.train("train", views, batch_size, seed, start, max_unreadable)
    return list(itertools.islice(batches, n))


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).integers(0, 256, (23, 20, 26, 3), np.uint8)


@pytest.fixture(scope="module")
def noisy(noise, tmp_path_factory):
    """A folder of 23 noise images, named in the order of the array."""
    folder = tmp_path_factory.mktemp("noisy")
    for i, image in enumerate(noise):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return folder


def test_batches_are_those_of_the_same_images_in_memory(noisy, noise):
    """Order, boxes and resizing do not depend on where the images are stored."""
    memory = ArraySource({"train": (noise, None)})
    same_batches(train(FolderSource(noisy), 7), train(memory, 7))
    in_memory = memory.evaluate("train", 12, 16, "bicubic", 5)
    for a, b in zip(
        FolderSource(noisy).evaluate("train", 12, 16, "bicubic", 5), in_memory, strict=True
    ):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("threads", [1, 7])
def test_batches_do_not_depend_on_the_threads(noisy, monkeypatch, threads):
    usual = train(FolderSource(noisy), 4)
    monkeypatch.setattr(encoded, "THREADS", threads)
    same_batches(train(FolderSource(noisy), 4), usual)


def test_reading_on_from_any_position_repeats_the_rest(noisy):
    source = FolderSource(noisy)
    whole = train(source, 9, batch_size=5)
    for i, batch in enumerate(whole[:-1]):
        rest = train(source, 8 - i, batch_size=5, start=batch.position)
        same_batches(rest, whole[i + 1 :])


@pytest.mark.parametrize("kind", ["list", "archives"])
@pytest.mark.parametrize("hosts", [1, 2])
def test_lists_and_archives_have_the_order_of_a_folder(noisy, tmp_path, kind, hosts):
    """Lists and archives of the same images give the same batches, from any position."""
    names = sorted(path.name for path in noisy.iterdir())
    if kind == "list":
        (tmp_path / "all.txt").write_text("".join(f"{noisy / name}\n" for name in names))
    else:
        for number, part in enumerate((names[:9], names[9:])):
            with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
                for name in part:
                    archive.add(noisy / name, name)
    location = tmp_path / "all.txt" if kind == "list" else tmp_path
    host = dict(process_index=hosts - 1, process_count=hosts)
    source, folder = FolderSource(location, **host), FolderSource(noisy, **host)
    whole = train(source, 6, batch_size=5)
    same_batches(whole, train(folder, 6, batch_size=5))
    for i, batch in enumerate(whole[:-1]):
        same_batches(train(source, 5 - i, batch_size=5, start=batch.position), whole[i + 1 :])
    for a, b in zip(
        source.evaluate("train", 12, 16, "bicubic", 5),
        folder.evaluate("train", 12, 16, "bicubic", 5),
        strict=True,
    ):
        np.testing.assert_array_equal(a["image"], b["image"])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_an_epoch_without_repeats(tmp_path, hosts):
    for i in range(24):
        save(tmp_path / f"{i:02}.png", "L", 10 * i, size=(6, 6))
    records = []
    for host in range(hosts):
        source = FolderSource(tmp_path, process_index=host, process_count=hosts)
        for batch in train(source, 2, batch_size=12 // hosts):
            assert batch.position.epoch == 0 or batch.position == Position(1, 0)
            records += (batch.views[0][:, 0, 0, 0] // 10).tolist()
    assert sorted(records) == list(range(24))


def test_the_seed_decides_order_and_crops(noisy):
    source = FolderSource(noisy)
    same_batches(train(source, 3), train(source, 3))
    other = train(source, 3, seed=4)
    assert any(
        (a.views[0] != b.views[0]).any() for a, b in zip(train(source, 3), other, strict=True)
    )


def save(path, mode="RGB", colour=(200, 30, 60), size=(20, 16), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def test_folder_with_splits_and_classes(tmp_path):
    for split, names in (("train", "ab"), ("val", "bc"), ("test", "a")):
        for i, name in enumerate(names):
            save(tmp_path / split / name / f"{i}.png")
            save(tmp_path / split / name / "deeper" / "é 图.JPG")
    (tmp_path / "train" / "a" / "notes.txt").write_text("not a picture")
    (tmp_path / "train" / "a" / ".hidden.png").write_bytes(b"")
    save(tmp_path / "other" / "ignored.png")
    source = FolderSource(tmp_path)
    assert source.num_classes == 3 and source.name == tmp_path.name
    counts = {split: source.count(split) for split in ("train", "validation", "test")}
    assert counts == {"train": 4, "validation": 4, "test": 2}
    (batch,) = source.evaluate("validation", 8, 0, "bilinear", 4)
    assert batch["label"].tolist() == [1, 1, 2, 2]


def test_flat_folder_is_unlabelled(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.bmp")
        save(tmp_path / f"{i}.webp", lossless=True)
    source = FolderSource(tmp_path, name="mine")
    assert (source.num_classes, source.name, source.count("train")) == (None, "mine", 10)
    (batch,) = source.evaluate("train", 8, 0, "bilinear", 10)
    assert (batch["label"] == -1).all()
    assert (batch["image"] == (200, 30, 60)).all()
    assert len(train(source, 2)) == 2


def test_folders_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no folder.*config\.data\.dir"):
        FolderSource(tmp_path / "none")
    with pytest.raises(UserError, match="no images"):
        FolderSource(tmp_path)
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="no images"):
        FolderSource(tmp_path)
    with pytest.raises(UserError, match="matches no images"):
        FolderSource(tmp_path / "*.txt")
    for name in ("val", "validation"):
        save(tmp_path / name / "a.png")
    with pytest.raises(UserError, match="both val and validation"):
        FolderSource(tmp_path)


def test_links_in_a_circle_end(tmp_path):
    save(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert FolderSource(tmp_path).count("train") == 1


def test_a_pattern_takes_what_it_matches(tmp_path):
    save(tmp_path / "a" / "1.png")
    save(tmp_path / "a" / "deep" / "2.jpg")
    save(tmp_path / "b" / "3.png")
    (tmp_path / "a" / "4.txt").write_text("no picture")
    for pattern, count in (("**/*.png", 2), ("a/**", 2), ("[ab]/*", 2), ("a/?.png", 1)):
        source = FolderSource(str(tmp_path / pattern))
        assert source.count("train") == count, pattern
        assert source.num_classes is None
    source = FolderSource(str(tmp_path / "a" / "*"))
    assert source.count("train") == 1
    assert source.skipped.lines() == [
        f"1 with suffix .txt: {tmp_path}/a/4.txt",
        f"1 folders, but patterns must match files: {tmp_path}/a/deep/",
    ]


def test_the_same_name_in_two_classes_and_empty_classes(tmp_path):
    for name in "ab":
        save(tmp_path / name / "same.png", colour=(0, 0, 255 if name == "b" else 0))
    (tmp_path / "empty").mkdir()
    source = FolderSource(tmp_path)
    (batch,) = source.evaluate("train", 4, 0, "bilinear", 2)
    assert source.num_classes == 2 and batch["label"].tolist() == [0, 1]
    assert batch["image"][:, 0, 0, 2].tolist() == [0, 255]


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (20_000, 3)])
def test_pictures_of_any_shape_are_cropped(tmp_path, size):
    for i in range(2):
        save(tmp_path / f"{i}.png", size=size)
    (batch,) = train(FolderSource(tmp_path), 1, batch_size=2)
    assert batch.views[0].shape == (2, 8, 8, 3)
    assert (batch.views[0] == (200, 30, 60)).all()
    (batch,) = FolderSource(tmp_path).evaluate("train", 8, 10, "bilinear", 2)
    assert (batch["image"] == (200, 30, 60)).all()


def damage(folder):
    """Writes four good images and three that cannot be decoded; returns the names of these."""
    for i in range(4):
        save(folder / "a" / f"{i}.jpg", size=(64, 64))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "a" / "cut.jpg")
    whole = (folder / "a" / "cut.jpg").read_bytes()
    (folder / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "a" / "empty.png").write_bytes(b"")
    (folder / "a" / "text.webp").write_text("hello")
    return ["a/cut.jpg", "a/empty.png", "a/text.webp"]


def test_unreadable_pictures_are_skipped_and_named(tmp_path, caplog):
    bad = damage(tmp_path)
    source = FolderSource(tmp_path)
    with caplog.at_level(logging.WARNING):
        batches = train(source, 4, batch_size=2, max_unreadable=3)
    assert sorted(name.split()[0] for name in source.unreadable) == bad
    assert all(sum(name in line for line in caplog.messages) == 1 for name in bad)
    # Four of seven are readable: two batches an epoch, wherever the others are in the order.
    assert [b.position.epoch for b in batches][-1] >= 1
    assert all(np.abs(b.views[0].astype(int) - (200, 30, 60)).max() < 9 for b in batches)
    for i, batch in enumerate(batches[:-1]):
        rest = train(source, 3 - i, batch_size=2, start=batch.position, max_unreadable=3)
        same_batches(rest, batches[i + 1 :])
    with pytest.raises(UserError, match=r"more than 2 .*config\.data\.max_unreadable"):
        train(FolderSource(tmp_path), 4, batch_size=2, max_unreadable=2)


def test_evaluation_skips_and_names_unreadable_pictures(tmp_path):
    bad = damage(tmp_path)
    source = FolderSource(tmp_path, max_unreadable=3)
    batches = list(source.evaluate("train", 8, 0, "bilinear", 3))
    assert [len(b["image"]) for b in batches] == [3, 3, 3]
    assert sum(b["mask"].sum() for b in batches) == 4
    assert sorted(name.split()[0] for name in source.unreadable) == bad
    with pytest.raises(UserError, match=r"more than 0 .*max_unreadable"):
        list(FolderSource(tmp_path).evaluate("train", 8, 0, "bilinear", 3))


def test_nothing_readable_is_an_error(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no")
    with pytest.raises(UserError, match="has 0: choose a batch"):
        train(FolderSource(tmp_path), 1, batch_size=2, max_unreadable=9)


def test_a_subset_keeps_the_named_files(tmp_path):
    for split in ("train", "val"):
        for i in range(4):
            save(tmp_path / split / "ab"[i % 2] / f"{i}.png", colour=(i, i, i))
    source = FolderSource(tmp_path, subset={"train": ["1.png", "2.png"]})
    assert (source.count("train"), source.count("validation"), source.num_classes) == (2, 4, 2)
    (batch,) = source.evaluate("train", 8, 0, "bilinear", 2)
    assert batch["label"].tolist() == [0, 1] and batch["image"][:, 0, 0, 0].tolist() == [2, 1]
    with pytest.raises(UserError, match=r"1 of 2 file names of config\.data\.subset.*'9\.png'"):
        FolderSource(tmp_path, subset={"train": ["1.png", "9.png"]})
