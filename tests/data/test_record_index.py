"""The index of TFRecord files: reading, storing, rebuilding, damage."""

import errno
import logging
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from disco_jax.data import record_index, records
from disco_jax.data.record_index import RecordIndex, open_index
from disco_jax.errors import UserError

COUNTS = (5, 3)
SIZES = (0, 1, 100, 37, 2000, 8, 8, 300)
PLACES = [(0, 4), (1, 0), (0, 0), (1, 2), (0, 4), (0, 1), (1, 1), (0, 3), (0, 2)]


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    """Directory of the user's cache, empty at first."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def files(tmp_path):
    """Paths of two TFRecord files."""
    return write(tmp_path)


def write(folder, sizes=SIZES):
    """Writes two files; the data of record n over both are `sizes[n]` times the byte n."""
    tf, _ = records.tensorflow()
    paths, number = [], 0
    for file, count in enumerate(COUNTS):
        paths.append(f"{folder}/photos-train.tfrecord-0000{file}-of-00002")
        with tf.io.TFRecordWriter(paths[-1]) as out:
            for _ in range(count):
                out.write(bytes([number]) * sizes[number])
                number += 1
    return paths


def read(files, sizes=SIZES):
    """Opens the index, and asserts that records are read in any order."""
    index = RecordIndex(open_index(files, COUNTS, "photos-train"))
    for (file, number), data in zip(
        PLACES, index.read([(files[file], number) for file, number in PLACES]), strict=True
    ):
        position = COUNTS[0] * file + number
        assert data == bytes([position]) * sizes[position]


@pytest.fixture
def never_built(monkeypatch):
    """Function after whose call an index that is built is an error."""
    return lambda: monkeypatch.setattr(record_index, "_build", None)


def test_an_index_is_built_once_beside_the_files(files, never_built, caplog):
    with caplog.at_level(logging.INFO):
        read(files)
    assert "Indexed 8 records" in caplog.text
    folder = pathlib.Path(files[0]).parent
    assert sorted(path.name for path in folder.iterdir() if str(path) not in files) == [
        "photos-train.index.npz"
    ]
    never_built()
    read(files)


@pytest.mark.parametrize("block", [1, 64, 10_000])
def test_files_in_buckets_are_read_forwards_in_blocks(files, monkeypatch, block):
    local = open_index(files, COUNTS, "local")
    monkeypatch.setattr(record_index, "_BLOCK", block)
    monkeypatch.setattr(record_index, "_is_remote", lambda path: True)
    remote = open_index(files, COUNTS, "remote")
    for path in files:
        np.testing.assert_array_equal(remote[path], local[path])
    read(files)


def test_an_index_of_other_records_is_built_again(files, never_built, caplog):
    read(files)
    sizes = SIZES[::-1]
    write(pathlib.Path(files[0]).parent, sizes)
    caplog.clear()
    read(files, sizes)
    assert "belongs to other TFRecord files; it is built again" in caplog.text
    never_built()
    read(files, sizes)


def test_a_damaged_index_is_built_again(files, never_built, caplog):
    read(files)
    index = pathlib.Path(files[0]).with_name("photos-train.index.npz")
    whole = index.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:60] + b"\0\0\0\0" + whole[64:]):
        index.write_bytes(damaged)
        caplog.clear()
        read(files)
        assert "cannot be read" in caplog.text
        assert index.read_bytes() == whole
    never_built()
    read(files)


def test_the_users_cache_takes_the_index_of_a_folder_that_cannot_be_written(
    files, monkeypatch, never_built, user_cache, caplog
):
    folder, real = pathlib.Path(files[0]).parent, record_index.whole
    refused = [folder]

    def whole(path, **options):
        if any(place in pathlib.Path(path).parents for place in refused):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, **options)

    monkeypatch.setattr(record_index, "whole", whole)
    refused.append(user_cache)
    read(files)
    assert "stored nowhere: the next start builds it again" in caplog.text
    refused.remove(user_cache)
    read(files)
    assert {path.name for path in folder.iterdir()} == {pathlib.Path(path).name for path in files}
    (stored,) = (user_cache / "disco_jax" / "records").iterdir()
    assert stored.name.startswith("photos-train.")
    never_built()
    read(files)


def test_processes_that_build_at_the_same_time_do_not_disturb_each_other(files, never_built):
    code = (
        "import sys; from disco_jax.data.record_index import open_index;"
        "print([len(e) for e in open_index(sys.argv[1:], (5, 3), 'photos-train').values()])"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, *files], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate()[0] for process in processes] == ["[5, 3]\n"] * 3
    folder = pathlib.Path(files[0]).parent
    assert len(list(folder.iterdir())) == 3  # no unfinished file
    never_built()
    read(files)


def test_damaged_files_are_refused(files):
    with pytest.raises(UserError, match=r"00001-of-00002 has 3 records, but .* state 4"):
        open_index(files, (5, 4), "photos-train")
    path = pathlib.Path(files[1])
    whole = path.read_bytes()
    for cut in (whole[:-1], whole[:-312], whole + b"\0\0", b"\xff" * 40):
        path.write_bytes(cut)
        with pytest.raises(UserError, match="00001-of-00002 is cut short or damaged"):
            open_index(files, COUNTS, "photos-train")


def test_a_file_that_changes_after_it_was_indexed_is_refused(files):
    index = RecordIndex(open_index(files, COUNTS, "photos-train"))
    write(pathlib.Path(files[0]).parent, SIZES[::-1])
    with pytest.raises(UserError, match="00000-of-00002 has no record of 2000 bytes"):
        list(index.read([(files[0], 4)]))
