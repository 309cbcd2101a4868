"""The TFDS source: order, continuation, hosts, damaged records, and the digits data set."""

import io
import itertools
import os
import types

import numpy as np
import pytest
from PIL import Image

from disco_jax.data import digits, sources
from disco_jax.data.base import Position
from disco_jax.data.sources import TfdsSource
from disco_jax.errors import UserError

START = Position.start()
PREPARED = os.environ.get("DISCO_JAX_TEST_TFDS", "")


def crop(size=8, **changes):
    fields = dict(
        size=size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), interpolation="bilinear", antialias=True
    )
    return types.SimpleNamespace(**{**fields, **changes})


VIEWS = {0: crop(), 1: crop(6, scale=(0.05, 0.5), interpolation="bicubic")}
WHOLE = {0: crop(8, scale=(1.0, 1.0), ratio=(1.0, 1.0))}  # a square image comes out as it is


def train(source, n, batch_size=256, seed=3, start=START, views=VIEWS, max_unreadable=0):
    batches = source.train("train", views, batch_size, seed, start, max_unreadable)
    return list(itertools.islice(batches, n))


def assert_equal(ours, theirs):
    assert [b.position for b in ours] == [b.position for b in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.views.keys() == b.views.keys()
        for view in a.views:
            np.testing.assert_array_equal(a.views[view], b.views[view])


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A directory of prepared data sets that holds the digits."""
    root = tmp_path_factory.mktemp("tfds")
    digits.write(str(root))
    return str(root)


@pytest.fixture(params=["in memory", "streamed"])
def path(request, monkeypatch):
    """Both ways to read: kept and cropped by NumPy, or from the disk and cropped by TensorFlow."""
    if request.param == "streamed":
        monkeypatch.setattr(sources, "_SMALL_BYTES", 0)
        monkeypatch.setattr(sources, "_SMALL_PIXELS", 0)
    return request.param


def open_digits(data_dir, **kwargs):
    return TfdsSource("digits", data_dir, **{"shuffle_buffer": 100, **kwargs})


# ---- order


@pytest.mark.parametrize("hosts", [1, 2])
def test_reading_on_from_any_position_repeats_the_rest(data_dir, path, hosts):
    def fresh():
        return open_digits(data_dir, process_index=hosts - 1, process_count=hosts)

    whole = train(fresh(), 12 // hosts)
    assert {b.position.epoch for b in whole} >= {0, 1, 2}
    for i in (0, 1, len(whole) - 3, len(whole) - 2):
        rest = train(fresh(), len(whole) - 1 - i, start=whole[i].position)
        assert_equal(rest, whole[i + 1 :])


def test_batches_have_the_promised_layout(data_dir, path):
    (batch,) = train(open_digits(data_dir), 1, batch_size=5)
    assert batch.aux == {} and batch.position == Position(0, 5)
    assert {v: x.shape for v, x in batch.views.items()} == {0: (5, 8, 8, 3), 1: (5, 6, 6, 3)}
    assert all(x.dtype == np.uint8 for x in batch.views.values())


def test_the_seed_decides_order_and_crops(data_dir, path):
    first, again, other = (train(open_digits(data_dir), 2, seed=s) for s in (3, 3, 4))
    assert_equal(first, again)
    for a, b in zip(first, other, strict=True):
        assert (a.views[0] != b.views[0]).any()


def test_views_of_equal_settings_differ(data_dir, path):
    (batch,) = train(open_digits(data_dir), 1, views={0: crop(), 1: crop()})
    assert (batch.views[0] != batch.views[1]).any()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_an_epoch_without_repeats(data_dir, path, hosts):
    count = 1437 // hosts
    batch_size = {1: 479, 2: 359, 4: 359}[hosts]  # count is a multiple of 479 and of 359, 2x and 1x
    batch_size = batch_size if count % batch_size == 0 else count
    epochs = [[], []]
    for host in range(hosts):
        source = open_digits(data_dir, process_index=host, process_count=hosts)
        per_epoch = count // batch_size
        for i, batch in enumerate(train(source, 2 * per_epoch, batch_size, views=WHOLE)):
            epochs[i // per_epoch] += [image.tobytes() for image in batch.views[0]]
    every = [image.tobytes() for image in np.repeat(stored("train")[0][..., None], 3, -1)]
    assert len(set(every)) == len(every)
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == hosts * count
        assert set(epoch) <= set(every)
    assert epochs[0] != epochs[1]


def stored(split):
    """(images u8[N, 8, 8], labels [N]) that `digits` writes."""
    return digits._load()[split]


def test_a_batch_that_does_not_divide_the_share_drops_the_remainder(data_dir, path):
    batches = train(open_digits(data_dir), 6, views=WHOLE)
    assert [b.position for b in batches[4:]] == [Position(1, 0), Position(1, 256)]
    seen = [image.tobytes() for b in batches[:5] for image in b.views[0]]
    assert len(set(seen)) == len(seen) == 5 * 256


def test_cached_records_are_kept_whatever_their_size(data_dir, monkeypatch):
    want = train(open_digits(data_dir), 2)
    monkeypatch.setattr(sources, "_SMALL_BYTES", 0)
    assert_equal(train(open_digits(data_dir, cache=True), 2), want)
    assert (train(open_digits(data_dir), 1)[0].views[0] != want[0].views[0]).any()


def test_batches_and_splits_that_cannot_work_are_refused(data_dir):
    source = open_digits(data_dir, process_count=2)
    with pytest.raises(UserError, match=r"config\.batch_size.*between 1 and 718"):
        source.train("train", VIEWS, 719, 0, START, 0)
    with pytest.raises(UserError, match=r"split of digits='tests'.*Did you mean 'test'"):
        source.train("tests", VIEWS, 8, 0, START, 0)
    with pytest.raises(UserError, match="validation.*Allowed: test, train"):
        source.count("validation")
    with pytest.raises(UserError, match=r"config\.augment\.interpolation='cubic'"):
        source.train("train", {0: crop(interpolation="cubic")}, 8, 0, START, 0)


def test_a_part_of_a_split_is_a_split(data_dir, path):
    source = open_digits(data_dir)
    assert source.count("train[:100]") == 100
    batches = list(itertools.islice(source.train("train[:100]", WHOLE, 50, 0, START, 0), 2))
    seen = {image[..., 0].tobytes() for b in batches for image in b.views[0]}
    assert seen == {image.tobytes() for image in stored("train")[0][:100]}


# ---- evaluation


@pytest.mark.parametrize(("hosts", "limit"), [(1, 0), (4, 0), (1, 5), (3, 100)])
def test_hosts_evaluate_everything_once_in_as_many_batches(data_dir, hosts, limit):
    images, labels, batches = [], [], set()
    for host in range(hosts):
        source = open_digits(data_dir, process_index=host, process_count=hosts)
        found = list(source.evaluate("test", 8, 8, "bilinear", 50, limit))
        batches.add(len(found))
        for batch in found:
            assert batch["image"].shape == (50, 8, 8, 3) and batch["image"].dtype == np.uint8
            assert batch["label"].shape == (50,) and batch["label"].dtype == np.int32
            mask = batch["mask"]
            assert (batch["label"][~mask] == -1).all() and (batch["image"][~mask] == 0).all()
            assert not mask[np.argmin(mask) :].any() or mask.all()
            images += list(batch["image"][mask])
            labels += list(batch["label"][mask])
    assert len(batches) == 1
    assert len(images) == (limit or 360)
    if hosts == 1 or not limit:
        want_images, want_labels = (x[: limit or None] for x in stored("test"))
        np.testing.assert_array_equal(np.array(images)[..., 0], want_images)
        assert labels == want_labels.tolist()


def test_evaluation_checks_before_it_reads(data_dir):
    source = open_digits(data_dir)
    with pytest.raises(UserError, match="smaller than the crop"):
        source.evaluate("test", 8, 7, "bilinear", 4)
    with pytest.raises(UserError, match="cubic"):
        source.evaluate("test", 8, 8, "cubic", 4)
    (batch,) = source.evaluate("test", 6, 0, "bicubic", 4, limit=4)
    assert batch["image"].shape == (4, 6, 6, 3)


# ---- damaged records

BAD = {"train": (0, 12, 13, 29, 39), "test": (3, 10)}
COUNTS = {"train": 40, "test": 11}
CROPS = {0: crop(16), 1: crop(8, antialias=False)}


def jpeg(level, size):
    out = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(out, "JPEG", quality=100)
    return out.getvalue()


def write_photographs(root, bad=BAD):
    """Pictures of two sizes, record i of the grey level 6 i; the bad ones are damaged JPEGs."""
    tf, tfds = sources.tensorflow()
    folder = root / "photographs" / "1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=11),
        }
    )
    splits = []
    for split, count in COUNTS.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=str(folder), dataset_name="photographs", split=split, filetype_suffix="tfrecord"
        )
        file = str(template.sharded_filepath(shard_index=0, num_shards=1))
        with tf.io.TFRecordWriter(file) as out:
            for i in range(count):
                encoded = jpeg(6 * i, (96, 70) if i % 2 else (70, 96))
                if i in bad.get(split, ()):
                    encoded = [encoded[: len(encoded) // 2], b"no picture", b"\xff\xd8\xff"][i % 3]
                example = features.encode_example({"image": encoded, "label": i % 11})
                out.write(features.serialize_example(example))
        splits.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=[count], num_bytes=1000, filename_template=template
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder),
        features=features,
        split_infos=splits,
        version="1.0.0",
        supervised_keys=("image", "label"),
    )


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    write_photographs(root)
    return str(root)


def named(split, rows):
    return {f"photographs-{split}.tfrecord-00000-of-00001__{i}" for i in rows}


def levels(images):
    return np.rint(images.reshape(len(images), -1).mean(axis=1) / 6).astype(int).tolist()


def test_damaged_records_are_skipped_counted_and_named(photographs, path, caplog):
    source = TfdsSource("photographs", photographs, shuffle_buffer=16)
    batches = train(source, 8, 7, views=CROPS, max_unreadable=5)
    assert [b.position.epoch for b in batches] == [0, 0, 0, 0, 1, 1, 1, 1] or [
        b.position.epoch for b in batches
    ] == [0, 0, 0, 0, 1, 1, 1, 1]
    good = sorted(set(range(40)) - set(BAD["train"]))
    for epoch in (batches[:5], batches[5:]):
        for batch in epoch:
            assert levels(batch.views[0]) == levels(batch.views[1])
    first = [level for b in batches[:5] for level in levels(b.views[0])]
    assert sorted(first) == good
    assert set(source.unreadable) == named("train", BAD["train"])
    assert len(source.unreadable) == 5
    for name in source.unreadable:
        assert sum(name in line for line in caplog.messages) == 1


def test_reading_on_past_damaged_records_repeats_the_rest(photographs, path):
    def fresh():
        return TfdsSource("photographs", photographs, shuffle_buffer=16)

    whole = train(fresh(), 10, 6, views=CROPS, max_unreadable=5)
    assert {b.position.epoch for b in whole} >= {0, 1}
    for i in range(9):
        rest = train(
            fresh(), min(3, 9 - i), 6, start=whole[i].position, views=CROPS, max_unreadable=5
        )
        assert_equal(rest, whole[i + 1 : i + 4])


def test_too_many_damaged_records_are_an_error(photographs, path):
    source = TfdsSource("photographs", photographs, shuffle_buffer=16, max_unreadable=1)
    with pytest.raises(
        UserError, match=r"records of photographs.*config\.data\.max_unreadable=4: photographs-train"
    ):
        train(source, 8, 7, views=CROPS, max_unreadable=4)
    source = TfdsSource("photographs", photographs, max_unreadable=1)
    with pytest.raises(UserError, match=r"2 records.*max_unreadable=1.*__3, photographs-test.*__10"):
        list(source.evaluate("test", 16, 20, "bilinear", 4))


def test_a_data_set_without_a_readable_batch_is_an_error(tmp_path, path):
    write_photographs(tmp_path, {"train": range(40)})
    source = TfdsSource("photographs", str(tmp_path), shuffle_buffer=16)
    with pytest.raises(UserError, match="between 1 and 0|has 0"):
        train(source, 1, 7, views=CROPS, max_unreadable=100)
    with pytest.raises(UserError, match="40 records"):
        train(source, 1, 7, views=CROPS, max_unreadable=39)


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_leaves_damaged_records_out(photographs, hosts):
    found, names, batches = [], set(), set()
    for host in range(hosts):
        source = TfdsSource(
            "photographs",
            photographs,
            max_unreadable=2,
            process_index=host,
            process_count=hosts,
        )
        made = list(source.evaluate("test", 16, 20, "bicubic", 4))
        batches.add(len(made))
        names |= set(source.unreadable)
        for batch in made:
            rows = levels(batch["image"][batch["mask"]])
            assert rows == batch["label"][batch["mask"]].tolist()
            found += rows
    assert found == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert names == named("test", BAD["test"])
    assert len(batches) == 1
