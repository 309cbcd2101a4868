"""Scanning of locations: every file is used or counted with a reason; splits are not guessed."""

import io
import os
import pathlib
import tarfile

import pytest
from PIL import Image

from disco_jax.data import contract, decode, splits, tree
from disco_jax.data.folders import FolderSource
from disco_jax.data.skips import Skipped
from disco_jax.errors import UserError


def save(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (9, 8, 7)).save(path)


def make(root, *names):
    """Writes images below a folder and returns the folder."""
    save(*(root / name for name in names))
    return root


def used(source):
    """Returns split -> {name: label}."""
    return {
        split: {name: label for name, _, label in source.iter_images(split)}
        for split in source.splits
    }


def ambiguity_message(location, **options):
    """Returns the error of `FolderSource` for ambiguous splits, one line with the settings."""
    with pytest.raises(UserError) as error:
        FolderSource(location, **options)
    text = str(error.value)
    assert "config.data.splits" in text and "\n" not in text and len(text) < 500
    return text


# ---- splits


@pytest.mark.parametrize(
    "folders",
    [
        ("Train", "Test"),
        ("training", "testing"),
        ("train", "Test"),
        ("TRAIN", "VAL"),
        ("train", "valid"),
        ("train", "dev"),
        ("train", "Validation"),
    ],
)
def test_splits_are_recognised_whatever_their_case_and_name(tmp_path, folders):
    for folder in folders:
        make(tmp_path / folder, "cat/1.jpg", "dog/1.jpg")
    source = FolderSource(tmp_path)
    other = "test" if folders[1].lower().startswith("test") else "validation"
    assert sorted(source.splits) == sorted(["train", other]) and source.class_names == [
        "cat",
        "dog",
    ]
    assert source.count("train") == source.count(other) == 2
    assert not source.skipped


@pytest.mark.parametrize(
    "names, message",
    [
        (["train/1.png", "bus/1.png", "car/1.png"], "'train' beside 'bus', 'car'"),
        (["Test/1.png", "photos/1.png"], "'Test' beside 'photos'"),
        (["train2017/1.png", "val2017/1.png"], "'train2017', 'val2017'"),
        (["cat/1.png", "test_set/1.png"], "'test_set' beside 'cat'"),
        (["images/train/1.png", "images/val/1.png"], "validation=images/val"),
        (["cat/train/1.png", "dog/1.png"], "cat/train"),
        (["cat/train/1.png", "cat/test/1.png", "dog/train/1.png"], "each split a list"),
        (["train/cat/train/1.png", "train/cat/test/1.png"], "train/cat/test"),
        (["train/1.png", "val/1.png", "validation/1.png"], "both val and validation"),
        (["train/1.png", "Train/1.png", "test/1.png"], "both Train and train"),
    ],
)
def test_names_that_allow_two_answers_are_asked_about(tmp_path, names, message):
    make(tmp_path, *names)
    assert message in ambiguity_message(tmp_path)
    source = FolderSource(tmp_path, splits="train=.")  # this setting is always possible
    assert source.splits == ["train"] and source.count("train") == len(names)


def test_a_class_may_be_called_as_a_split_inside_of_one(tmp_path):
    make(tmp_path, "train/bus/1.png", "train/train/1.png", "test/bus/2.png", "test/train/2.png")
    assert FolderSource(tmp_path).class_names == ["bus", "train"]


def test_splits_are_given_by_hand(tmp_path):
    make(tmp_path, "A b/cat/1.png", "A b/dog/2.png", "c/d/cat/3.png", "e/4.png", "5.png")
    source = FolderSource(tmp_path, splits="train=A b, test = c/d")
    assert used(source) == {
        "train": {"A b/cat/1.png": 0, "A b/dog/2.png": 1},
        "test": {"c/d/cat/3.png": 0},
    }
    assert source.skipped.as_dict() == {
        "outside the splits": {"count": 2, "names": ["5.png", "e/4.png"]}
    }
    inner = FolderSource(tmp_path, splits="train=.,test=c/d")  # the inner folder takes precedence
    assert inner.count("train") == 4 and inner.count("test") == 1
    make(tmp_path, "f [1]/6.png")
    assert FolderSource(tmp_path, splits="train=f [1]").count("train") == 1
    pattern = FolderSource(tmp_path, splits="train=*/cat/*,test=e/*")
    assert pattern.count("train") == 2 and pattern.count("test") == 1
    for setting, message in (("train=a b", "Did you mean 'A b'"), ("train", "train=Training")):
        with pytest.raises(UserError, match=message):
            FolderSource(tmp_path, splits=setting)


def test_words_in_names_of_splits():
    assert [splits.resemble(n) for n in ("ILSVRC2012_img_val", "trainA", "TEST-set")] == [
        "validation",
        "train",
        "test",
    ]
    assert [splits.resemble(n) for n in ("trained", "latest", "train_test", "cat")] == [""] * 4


# ---- skipped files


def test_everything_below_a_place_is_used_or_counted(tmp_path):
    make(tmp_path, "train/a/1.png", "train/a/.hidden.png", "test/a/2.png", "other/3.png", "4.png")
    for name in ("notes.txt", "train/a/labels.CSV", "train/noname", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "train" / "b").symlink_to(tmp_path / "train" / "a", target_is_directory=True)
    (tmp_path / "train" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "train" / "gone.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(tmp_path / "train" / "pipe.png")
    (tmp_path / "train" / "zero.png").symlink_to("/dev/zero")
    source = FolderSource(tmp_path)
    assert used(source) == {"train": {"train/a/1.png": 0}, "test": {"test/a/2.png": 0}}
    names_by_reason = {
        reason: sorted(entry["names"]) for reason, entry in source.skipped.as_dict().items()
    }
    assert names_by_reason == {
        "with suffix .txt": ["notes.txt"],
        "with suffix .csv": ["train/a/labels.CSV"],
        "without a suffix": ["train/noname"],
        "hidden": [".git", "train/a/.hidden.png"],
        "outside the splits": ["4.png", "other/3.png"],
        "duplicate": ["train/b/", "train/up/"],
        "unreadable": ["train/gone.png"],
        tree.NO_FILE: ["train/pipe.png", "train/zero.png"],
    }


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    make(tmp_path, "train/cat/1.png", "train/dog/1.png")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    source = FolderSource(tmp_path)
    assert source.skipped.lines() == ["1 unreadable: train/dog/"]
    assert contract.contents(source) == [
        f"{source.name}: images: train 1; 1 classes (cat).",
        f"{source.name}: not used: 1 unreadable: train/dog/",
    ]


def test_a_folder_seen_through_a_link_keeps_its_own_class(tmp_path):
    make(tmp_path, "b/1.png", "c/2.png")
    (tmp_path / "a").symlink_to(tmp_path / "b", target_is_directory=True)
    source = FolderSource(tmp_path)
    assert source.class_names == ["b", "c"]
    assert source.skipped.lines() == ["1 duplicate: a/"]


def test_reasons_are_counted_whole_and_named_in_part():
    skipped = Skipped()
    for i in range(7):
        skipped.add("with suffix .txt", f"{i}\n.txt")
    for i in range(13):
        skipped.add(f"with suffix .{i}", "caf\udce9")
    first, second, *_, last = skipped.lines()
    assert first == r"7 with suffix .txt: 0\n.txt, 1\n.txt, 2\n.txt, 3\n.txt, 4\n.txt, ..."
    assert second == r"1 with suffix .0: caf\xe9" and last == "2 for 2 other reasons"


def test_a_place_without_pictures_says_what_is_there(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"")
    with pytest.raises(UserError, match=r"has no images.*Skipped: 1 with suffix \.heic: a\.heic"):
        FolderSource(tmp_path)


# ---- locations other than folders


def test_a_folder_with_brackets_in_its_name_is_a_folder(tmp_path):
    make(tmp_path / "photos [2024]", "train/cat/1.png")
    assert FolderSource(tmp_path / "photos [2024]").class_names == ["cat"]


def test_patterns_and_lists_over_several_splits_are_asked_about(tmp_path):
    make(tmp_path, "train/cat/1.png", "test/cat/2.png")
    listed = tmp_path / "all.txt"
    listed.write_text("train/cat/1.png\ntest/cat/2.png\n")
    for location in (f"{tmp_path}/**/*.png", listed):
        assert "'test', 'train'" in ambiguity_message(location)
        assert FolderSource(location, splits="train=.").count("train") == 2
    with pytest.raises(UserError, match="divides a folder"):
        FolderSource(listed, splits="train=train")


def test_lists_have_paths_and_classes(tmp_path):
    make(tmp_path, "a.png", "b, c.png", "deep/d.png", "e.png")
    (tmp_path / "caf\udce9.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "no.txt").write_text("")
    os.mkfifo(tmp_path / "pipe.png")
    lines = [
        "\ufefffile,class",  # a header
        "a.png,dog,further",
        '"b, c.png",cat',
        "deep/d.png\tcat\t7",
        f"{tmp_path}/e.png",
        "",
        "gone.png,cat",
        "a.png,dog",
        "pipe.png",
        "no.txt",
        "caf\udce9.png,cat",
    ]
    listed = tmp_path / "all.csv"
    listed.write_bytes("\r\n".join(lines).encode("utf-8", "surrogateescape"))
    source = FolderSource(listed)
    names = [os.path.basename(name) for name, _, _ in source.iter_images("train")]
    assert names == [
        "a.png",
        "b, c.png",
        "d.png",
        "e.png",
        r"caf\xe9.png",
    ]  # in the order of the list
    assert [label for *_, label in source.iter_images("train")] == [1, 0, 0, -1, 0]
    assert source.class_names == ["cat", "dog"] and source.name == "all"
    assert set(source.skipped.lines()) == {
        "1 without a suffix: file",
        "1 missing: gone.png",
        "1 duplicate: a.png",
        f"1 {tree.NO_FILE}: pipe.png",
        "1 with suffix .txt: no.txt",
    }
    listed.write_text("a.png,dog\na.png,cat\n")
    with pytest.raises(UserError, match=r"two labels for a\.png, 'dog' and 'cat'"):
        FolderSource(listed)


def test_whole_numbers_in_a_list_are_labels(tmp_path):
    make(tmp_path, "a.png", "b.png", "c.png")
    listed = tmp_path / "all.tsv"
    listed.write_text("a.png\t10\nb.png\t2\nc.png\t-1\n")
    source = FolderSource(listed)
    assert [label for *_, label in source.iter_images("train")] == [10, 2, -1]
    assert source.num_classes == 11
    for label in (str(2**40), "-5"):
        listed.write_text(f"a.png,{label}\n")
        with pytest.raises(UserError, match=rf"the class {label}; classes must be integers"):
            FolderSource(listed)


def test_lists_are_splits_of_a_folder(tmp_path):
    make(tmp_path, "cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png")
    (tmp_path / "train.txt").write_text("cat/1.png,cat\ndog/3.png,dog\n")
    (tmp_path / "test.txt").write_text("dog/4.png,dog\n")
    source = FolderSource(tmp_path, splits="train=train.txt,test=test.txt")
    assert [label for *_, label in source.iter_images("train")] == [0, 1]
    assert [label for *_, label in source.iter_images("test")] == [1]
    assert source.skipped.lines() == ["1 outside the splits: cat/2.png"]


@pytest.mark.parametrize(
    "lines, labels",
    [
        ("v1.png,dog\nv2.png,cat\n", [1, 0]),
        ("val/v1.png\tdog\nv2\tcat\n", [1, 0]),  # whole paths, names without suffix
        ("v1.png,1\nv2.png,0\n", [1, 0]),  # numbers of the sorted classes
        ("v1.png,dog\ngone.png,cat\n", [1, -1]),
    ],
)
def test_a_flat_split_takes_its_labels_from_a_list(tmp_path, lines, labels):
    make(tmp_path / "data", "train/cat/v1.png", "train/dog/b.png", "val/v1.png", "val/v2.png")
    listed = tmp_path / "val.txt"
    listed.write_text(lines)
    source = FolderSource(tmp_path / "data", labels=str(listed))
    assert [label for *_, label in source.iter_images("validation")] == labels
    assert [label for *_, label in source.iter_images("train")] == [0, 1]
    assert source.num_classes == 2 and source.class_names == ["cat", "dog"]
    assert ("gone" in lines) == bool(source.skipped)


def test_labels_that_do_not_fit_are_refused(tmp_path):
    make(tmp_path / "data", "train/cat/a.png", "train/dog/b.png", "val/a.png", "val/x/../a2.png")
    make(tmp_path / "data", "test/a.png")
    listed = tmp_path / "val.txt"
    for lines, message in (
        ("a.png,cat\n", "which could be"),
        ("other.png,cat\n", "names none of the images"),
        ("val/a.png,bird\n", "'bird', which is not a folder"),
        ("val/a.png,2\n", "the class 2; classes must be integers from 0 to 1"),
        ("", "has no file names"),
    ):
        listed.write_text(lines)
        with pytest.raises(UserError, match=message):
            FolderSource(tmp_path / "data", labels=str(listed))
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"config\.data\.labels=.*there is no file"):
        FolderSource(tmp_path / "data", labels=str(tmp_path / "pipe.txt"))


def archive(path, members):
    """Writes a .tar of (name, bytes); None stands for an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (9, 8, 7)).save(file, "PNG")
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            content = file.getvalue() if content is None else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_archives_are_read_as_webdataset_names_them(tmp_path):
    archive(tmp_path / "0000.tar", [("a/x.png", None), ("a/x.cls", b"1"), ("a/x.seg.png", None)])
    archive(tmp_path / "0001.tar", [("y.cls", b"0\n"), ("y.PNG", None), ("y.json", b"{}")])
    archive(tmp_path / "0002.tar", [("z.png", None), ("._z.png", b"?"), ("v1.2.png", None)])
    with tarfile.open(tmp_path / "0002.tar", "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = FolderSource(tmp_path)
    assert used(source) == {
        "train": {
            "0000.tar/a/x.png": 1,
            "0001.tar/y.PNG": 0,
            "0002.tar/z.png": -1,
            "0002.tar/v1.2.png": -1,
        }
    }
    assert set(source.skipped.lines()) == {
        "1 with suffix .seg.png: 0000.tar/a/x.seg.png",
        "1 with suffix .json: 0001.tar/y.json",
        "1 hidden: 0002.tar/._z.png",
        "1 not a regular file (a link, pipe or device): 0002.tar/link.png",
    }
    single = FolderSource(tmp_path / "0001.tar")
    assert single.count("train") == 1 and single.name == "0001"


def test_splits_of_archives_follow_from_folders_or_their_names(tmp_path):
    for name in ("in-train-0.tar", "in-train-1.tar", "in-val-0.tar"):
        archive(tmp_path / "named" / name, [("x.png", None)])
        archive(tmp_path / "folders" / name.split("-")[1] / name, [("x.png", None)])
        archive(tmp_path / "inside" / "0.tar", [("train/x.png", None), ("test/x.png", None)])
    for kind in ("named", "folders"):
        source = FolderSource(tmp_path / kind)
        assert source.count("train") == 2 and source.count("validation") == 1
    archive(tmp_path / "named" / "more.tar", [("x.png", None)])
    assert "more.tar" in ambiguity_message(tmp_path / "named")
    mapped = FolderSource(tmp_path / "named", splits="train=in-train-*,test=more.tar")
    assert mapped.count("train") == 2 and mapped.count("test") == 1
    assert "'test', 'train': give each split a list" in ambiguity_message(tmp_path / "inside")


def test_damaged_archives_are_counted(tmp_path):
    whole = archive(tmp_path / "whole.tar", [(f"{i}.png", None) for i in range(4)]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:1200])
    damaged = bytearray(whole)
    damaged[1024:1100] = b"?" * 76  # the second header
    (tmp_path / "damaged.tar").write_bytes(damaged)
    (tmp_path / "text.tar").write_text("hello")
    source = FolderSource(tmp_path)
    names = [name for name, _, _ in source.iter_images("train")]
    assert names == [
        "cut.tar/0.png",
        "damaged.tar/0.png",
        *(f"whole.tar/{i}.png" for i in range(4)),
    ]
    skipped_lines = " ".join(source.skipped.lines())
    assert all(f"{name}.tar (" in skipped_lines for name in ("cut", "damaged", "text"))
    (tmp_path / "whole.tar").write_bytes(whole[:600])
    *_, (_, file, _) = source.iter_images("train")
    with pytest.raises(decode.Unreadable, match="archive is truncated"):
        decode.decode(file)


@pytest.mark.parametrize(
    "name, message",
    [
        ("photos.zip", "is a zip archive"),
        ("photos.tar.gz", "is a compressed file"),
        ("photos.tgz", r"is a compressed \.tar"),
        ("photo.JPG", "is a single image"),
        ("data.h5", "is a file of another kind"),
    ],
)
def test_other_files_are_refused_for_what_they_are(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(UserError, match=f"{message}.*a folder of images"):
        FolderSource(tmp_path / name)


def test_a_pipe_is_never_opened(tmp_path):
    for name in ("data", "list.txt", "shard.tar"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match="pipe"):
            FolderSource(tmp_path / name)


def test_relative_places_are_read_too(tmp_path, monkeypatch):
    make(tmp_path / "photos", "1.png")
    (tmp_path / "list.txt").write_text("photos/1.png\n")
    monkeypatch.chdir(tmp_path)
    for location in ("photos", "list.txt", "photos/*", pathlib.Path("photos")):
        (record,) = FolderSource(location).iter_images("train")
        assert decode.decode(record[1]).shape == (5, 6, 3)
