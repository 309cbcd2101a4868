"""The TFDS source with damaged records, both held in memory and streamed."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from disco_jax.data import digits, sources
from disco_jax.data.contract import Position
from disco_jax.data.sources import TfdsSource
from disco_jax.errors import UserError
from helpers import crop, same_batches

START = Position.start()


WHOLE = {0: crop(8, scale=(1.0, 1.0), ratio=(1.0, 1.0))}  # leaves a square image unchanged


def train(source, n, batch_size, views, start=START, max_unreadable=0):
    batches = source.train("train", views, batch_size, 3, start, max_unreadable)
    return list(itertools.islice(batches, n))


def test_views_of_other_sizes_leave_the_first_as_it_is(data_dir, path):
    """Each view draws independently, so adding views to a recipe does not change the first ones."""
    both = {0: crop(8), 1: crop(8)}
    more = {**both, 2: crop(4, scale=(0.05, 0.14)), 3: crop(5, interpolation="bicubic")}
    for name in ("digits", "photographs"):
        source = TfdsSource(name, data_dir)
        few, many = (train(source, 2, 4, views, max_unreadable=9) for views in (both, more))
        for a, b in zip(few, many, strict=True):
            assert [b.views[v].shape for v in range(4)] == [(4, s, s, 3) for s in (8, 8, 4, 5)]
            for view in both:
                np.testing.assert_array_equal(a.views[view], b.views[view])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Directory of prepared data sets: the digits and `photographs`."""
    root = tmp_path_factory.mktemp("prepared")
    digits.write(str(root))
    write_photographs(root)
    return str(root)


@pytest.fixture(params=["in memory", "streamed"])
def path(request, monkeypatch):
    """Both reading paths: in memory and cropped by batch, or streamed and cropped one by one."""
    if request.param == "streamed":
        monkeypatch.setattr(sources, "_MAX_CACHED_BYTES", 0)
        monkeypatch.setattr(sources, "_MAX_BATCHED_PIXELS", 0)
    return request.param


# ---- whole data sets


def test_both_ways_read_every_digit_of_a_part_once(data_dir, path):
    source = TfdsSource("digits", data_dir, shuffle_buffer=30)
    assert source.count("train[:100]") == 100
    batches = list(itertools.islice(source.train("train[:100]", WHOLE, 50, 0, START, 0), 2))
    images = sorted(image[..., 0].tobytes() for b in batches for image in b.views[0])
    assert images == sorted(image.tobytes() for image in digits._load()["train"][0][:100])


# ---- damaged records

BAD = {"train": (0, 12, 13, 29, 39), "test": (3, 10)}
COUNTS = {"train": 40, "test": 11}
CROPS = {0: crop(16), 1: crop(8, antialias="none")}


def jpeg(level, size):
    out = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(out, "JPEG", quality=100)
    return out.getvalue()


def write_photographs(root):
    """Writes images of two sizes; record i has grey level 6 i, records in `BAD` are damaged."""
    tf, tfds = sources.tensorflow()
    folder = root / "photographs" / "1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=11),
        }
    )
    templates = {
        split: tfds.core.ShardedFileTemplate(
            data_dir=str(folder),
            dataset_name="photographs",
            split=split,
            filetype_suffix="tfrecord",
        )
        for split in COUNTS
    }

    def records(bad):
        for split, count in COUNTS.items():
            file = templates[split].sharded_filepath(shard_index=0, num_shards=1)
            with tf.io.TFRecordWriter(str(file)) as out:
                for i in range(count):
                    encoded = jpeg(6 * i, (96, 70) if i % 2 else (70, 96))
                    if i in bad.get(split, ()):
                        encoded = (encoded[: len(encoded) // 2], b"text", b"\xff\xd8\xff")[i % 3]
                    example = features.encode_example({"image": encoded, "label": i % 11})
                    out.write(features.serialize_example(example))

    records({})  # TFDS decodes an image for the metadata
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder),
        features=features,
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[count],
                num_bytes=1000,
                filename_template=templates[split],
            )
            for split, count in COUNTS.items()
        ],
        version="1.0.0",
        supervised_keys=("image", "label"),
    )
    records(BAD)
    return folder


def named(split, rows):
    return {f"photographs-{split}.tfrecord-00000-of-00001__{i}" for i in rows}


def levels(images):
    return np.rint(images.mean(axis=(1, 2, 3)) / 6).astype(int).tolist()


def test_damaged_records_are_skipped_and_named_and_read_past(data_dir, path, caplog):
    source = TfdsSource("photographs", data_dir, shuffle_buffer=16)
    whole = train(source, 10, 7, CROPS, max_unreadable=5)
    assert [b.position.epoch for b in whole[5:9]] == [1] * 4
    for batch in whole:
        assert levels(batch.views[0]) == levels(batch.views[1])
    for epoch in (whole[:5], whole[5:]):
        read = sorted(level for b in epoch for level in levels(b.views[0]))
        assert read == sorted(set(range(40)) - set(BAD["train"]))
    assert {name.split()[0] for name in source.unreadable} == named("train", BAD["train"])
    assert all(sum(name in line for line in caplog.messages) == 1 for name in source.unreadable)
    for i in (0, 3, 5):
        again = TfdsSource("photographs", data_dir, shuffle_buffer=16)
        rest = train(again, 2, 7, CROPS, start=whole[i].position, max_unreadable=5)
        same_batches(rest, whole[i + 1 : i + 3])


def test_too_many_damaged_records_are_an_error(data_dir, path):
    source = TfdsSource("photographs", data_dir, shuffle_buffer=16, max_unreadable=1)
    with pytest.raises(
        UserError, match=r"more than 4 .*config\.data\.max_unreadable.*: photographs-train"
    ):
        train(source, 10, 7, CROPS, max_unreadable=4)
    source = TfdsSource("photographs", data_dir, max_unreadable=1)
    with pytest.raises(UserError, match=r"2 records.*more than 1 .*__3 .*, photographs-test.*__10"):
        list(source.evaluate("test", 16, 20, "bilinear", 4))


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_leaves_damaged_records_out(data_dir, hosts):
    records_read, names, batches = [], set(), set()
    for host in range(hosts):
        source = TfdsSource(
            "photographs", data_dir, max_unreadable=2, process_index=host, process_count=hosts
        )
        host_batches = list(source.evaluate("test", 16, 20, "bicubic", 4))
        batches.add(len(host_batches))
        names |= {name.split()[0] for name in source.unreadable}
        for batch in host_batches:
            read = levels(batch["image"][batch["mask"]])
            assert read == batch["label"][batch["mask"]].tolist()
            records_read += read
    assert records_read == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert names == named("test", BAD["test"]) and len(batches) == 1


@pytest.mark.parametrize("cut", ["in a record", "between records"])
def test_a_file_cut_short_is_an_error_and_no_endless_loop(tmp_path, path, cut):
    tf, _ = sources.tensorflow()
    folder = write_photographs(tmp_path)
    file = folder / "photographs-train.tfrecord-00000-of-00001"
    records = list(tf.data.TFRecordDataset(str(file)).take(20).as_numpy_iterator())
    if cut == "in a record":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        with tf.io.TFRecordWriter(str(file)) as out:
            for record in records:
                out.write(record)
    source = TfdsSource("photographs", str(tmp_path), shuffle_buffer=16, max_unreadable=100)
    with pytest.raises(UserError, match=r"photographs.*prepare the data set again"):
        train(source, 6, 7, CROPS, max_unreadable=100)
    with pytest.raises(UserError, match=r"photographs.*prepare the data set again"):
        list(source.evaluate("train", 16, 20, "bilinear", 8))
