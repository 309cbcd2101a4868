"""TFDS data sets: order, resuming, hosts, damaged records, and parity with torchvision."""

import contextlib
import io
import itertools
import json
import logging
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from disco_jax.data import contract, decode, digits, records, sources
from disco_jax.data.bags import Bags, BagSource
from disco_jax.data.contract import Position
from disco_jax.data.sources import TfdsSource
from disco_jax.data.subset import SubsetSource
from disco_jax.errors import UserError
from helpers import crop, same_batches

START = Position.start()
COUNT = 48  # records of the data set of JPEGs, in 4 files
SHAPES = ((40, 56), (56, 40), (33, 47))


VIEWS = {0: crop(), 1: crop(6, scale=(0.05, 0.5), interpolation="bicubic")}


def encode(image, kind="JPEG", **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def write(data_dir, name, records, *, shape=(None, None, 3), files=1, classes=10, kind="tfrecord"):
    """Writes a data set in the layout of `tfds build`; records is {split: [(bytes, label)]}.

    Record i of a split has the file name "i.jpg".
    """
    _, tfds = sources.tensorflow()
    folder = pathlib.Path(data_dir) / name / "1.0.0"
    folder.mkdir(parents=True)
    fields = {"image": tfds.features.Image(shape=shape), "file_name": tfds.features.Text()}
    if classes:
        fields["label"] = tfds.features.ClassLabel(num_classes=classes)
    features = tfds.features.FeaturesDict(fields)
    infos = [
        write_split(folder, name, split, examples, features, files, bool(classes), "tfrecord")
        for split, examples in records.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=infos, version="1.0.0"
    )
    if kind != "tfrecord":  # TFDS computes the metadata from TFRecord files only
        for file in folder.glob("*tfrecord*"):
            file.unlink()
        for split, examples in records.items():
            write_split(folder, name, split, examples, features, files, bool(classes), kind)
        info = folder / "dataset_info.json"
        info.write_text(info.read_text().replace("tfrecord", kind))
    return folder


def write_split(folder, name, split, examples, features, files, labelled, kind):
    """Writes the files of one split and returns their TFDS `SplitInfo`."""
    _, tfds = sources.tensorflow()
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split=split, filetype_suffix=kind
    )
    lengths, size = [], 0
    for i in range(files):
        begin, end = (len(examples) * n // files for n in (i, i + 1))
        lengths.append(end - begin)
        path = template.sharded_filepath(shard_index=i, num_shards=files)
        with writer(kind, str(path)) as out:
            for number, (encoded, label) in enumerate(examples[begin:end], begin):
                example = {"image": io.BytesIO(encoded), "file_name": f"{number}.jpg"}
                if labelled:
                    example["label"] = label
                out.write(features.serialize_example(features.encode_example(example)))
                size += len(encoded)
    return tfds.core.SplitInfo(
        name=split, shard_lengths=lengths, num_bytes=size, filename_template=template
    )


def writer(kind, path):
    if kind == "tfrecord":
        return sources.tensorflow()[0].io.TFRecordWriter(path)
    from array_record.python import array_record_module

    return contextlib.closing(array_record_module.ArrayRecordWriter(path, "group_size:1"))


def plain(i, shape=SHAPES[0]):
    """Encodes an image of one grey level that identifies its record."""
    return encode(np.full((*shape, 3), 5 * i, np.uint8), quality=95)


def numbers(images):
    """Returns the records of crops of `plain` images."""
    return np.rint(images[:, 2, 2, 0] / 5).astype(int).tolist()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Directory with the digits, `plain` JPEGs of several shapes, and noise in other formats."""
    path = tmp_path_factory.mktemp("tfds")
    digits.write(str(path))
    jpegs = [(plain(i, SHAPES[i % 3]), i % 10) for i in range(COUNT)]
    write(path, "plain", {"train": jpegs, "test": jpegs[:10]}, files=4)
    write(path, "at_will", {"train": jpegs, "test": jpegs[:10]}, files=3, kind="array_record")
    noise = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3), np.uint8)
    mixed = [
        (encode(noise[0]), 0),
        (encode(noise[1], "PNG"), 0),
        (encode(noise[0, ..., 0]), 0),
        (encode(noise[1, ..., 0], "PNG"), 0),
    ]
    write(path, "mixed", {"train": mixed}, classes=0)
    return str(path)


@pytest.fixture(params=["digits", "kept", "streamed", "at_will"])
def kind(request, data_dir, monkeypatch):
    """Opens a source that reads in each of the four ways."""
    if request.param in ("streamed", "at_will"):
        monkeypatch.setattr(sources, "_MAX_CACHED_BYTES", 0)
    name = request.param if request.param in ("digits", "at_will") else "plain"

    def make(**options):
        return TfdsSource(name, data_dir, shuffle_buffer=16, **options)

    return make


def train(source, n, batch_size=7, seed=3, start=START, views=VIEWS, limit=0):
    batches = source.train("train", views, batch_size, seed, start, limit)
    return list(itertools.islice(batches, n))


# ---- order


def test_reading_on_from_any_position_repeats_the_rest(kind):
    source = kind(process_index=1, process_count=2)
    size = source.count("train") // 2 // 3 - 1  # 3 batches an epoch and a remainder
    whole = train(source, 5, size)
    assert [b.position.epoch for b in whole] == [0, 0, 1, 1, 1]
    for i in (0, 2):
        again = kind(process_index=1, process_count=2)
        same_batches(train(again, 4 - i, size, start=whole[i].position), whole[i + 1 :])


def test_the_seed_decides_order_and_crops(kind):
    first = train(kind(), 3)
    same_batches(train(kind(), 3), first)
    for a, b in zip(train(kind(), 3, seed=4), first, strict=True):
        assert (a.views[0] != b.views[0]).any()


def test_batches_have_the_promised_layout(kind):
    (batch,) = train(kind(), 1)
    assert batch.aux == {} and batch.position == Position(0, 7)
    assert {v: x.shape for v, x in batch.views.items()} == {0: (7, 8, 8, 3), 1: (7, 6, 6, 3)}
    assert all(x.dtype == np.uint8 for x in batch.views.values())


def test_labels_come_with_their_images(kind):
    source = kind()
    for batch in train(source, 9):
        assert batch.labels.dtype == np.int32 and batch.labels.shape == (7,)
        if source.name != "digits":
            np.testing.assert_array_equal(batch.labels, np.array(numbers(batch.views[0])) % 10)
    stored = np.array([label for *_, label in source.iter_images("train")])
    whole = train(source, source.count("train") // 7)
    read = np.bincount(np.concatenate([batch.labels for batch in whole]), minlength=10)
    for batch in whole:
        np.testing.assert_array_equal(stored[batch.rows], batch.labels)
    assert len({row for batch in whole for row in batch.rows.tolist()}) == 7 * len(whole)
    dropped = np.bincount(stored, minlength=10) - read
    assert (dropped >= 0).all() and dropped.sum() == source.count("train") % 7


@pytest.mark.parametrize(
    ("name", "bytes_kept"), [("plain", 0), ("plain", 1e9), ("at_will", 0), ("at_will", 1e9)]
)
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_an_epoch_without_repeats(data_dir, monkeypatch, hosts, name, bytes_kept):
    monkeypatch.setattr(sources, "_MAX_CACHED_BYTES", bytes_kept)
    records_by_epoch = [[], []]
    for host in range(hosts):
        source = TfdsSource(
            name, data_dir, shuffle_buffer=16, process_index=host, process_count=hosts
        )
        per_epoch = COUNT // hosts // 4
        for i, batch in enumerate(train(source, 2 * per_epoch, 4)):
            assert numbers(batch.views[0]) == numbers(batch.views[1]) == batch.rows.tolist()
            records_by_epoch[i // per_epoch] += numbers(batch.views[0])
    assert sorted(records_by_epoch[0]) == sorted(records_by_epoch[1]) == list(range(COUNT))
    assert records_by_epoch[0] != records_by_epoch[1]


def test_reading_on_reads_no_more_than_a_group_of_files(data_dir, monkeypatch):
    monkeypatch.setattr(sources, "_MAX_CACHED_BYTES", 0)
    source = TfdsSource("plain", data_dir, shuffle_buffer=24)  # groups of 12: one of the 4 files
    read, mixed = [], records.Rows.mixed
    monkeypatch.setattr(
        records.Rows, "mixed", lambda rows, runs: read.append(runs) or mixed(rows, runs)
    )
    rest = list(source._shuffled("train", 3, 0, 30))
    assert len(rest) == 18 and [r[0][1] - r[0][0] for r in read] == [12, 12]
    again = TfdsSource("plain", data_dir, shuffle_buffer=24)
    assert [r.row for r in again._shuffled("train", 3, 0, 0)][30:] == [r.row for r in rest]


def test_groups_mix_files_and_every_epoch_other_ones(data_dir, monkeypatch):
    monkeypatch.setattr(sources, "_MAX_CACHED_BYTES", 0)
    source = TfdsSource("plain", data_dir, shuffle_buffer=48)  # groups of 24: two files
    firsts = set()
    for epoch in range(6):
        rows = [record.row for record in source._shuffled("train", 3, epoch, 0)]
        assert sorted(rows) == list(range(COUNT))
        files = np.array(rows).reshape(2, 24) // 12
        assert all(len(set(half)) == 2 and (np.diff(half) != 0).sum() > 4 for half in files)
        firsts.add(frozenset(files[0].tolist()))
    assert len(firsts) > 1


# ---- parts of a data set


@pytest.mark.parametrize("name", ["plain", "at_will"])
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_subset_keeps_the_named_files(data_dir, name, hosts):
    names = {f"{i}.jpg" for i in range(0, COUNT, 3)}
    records_read = []
    for host in range(hosts):
        source = TfdsSource(
            name, data_dir, subset={"train": names}, process_index=host, process_count=hosts
        )
        assert (source.count("train"), source.count("test")) == (16, 10)
        for batch in train(source, 2, 8 // hosts):
            records_read += numbers(batch.views[0])
            assert numbers(batch.views[0]) == (3 * batch.rows).tolist()
        labels = [b["label"][b["mask"]] for b in source.evaluate("train", 8, 0, "bilinear", 5)]
        first = host * 16 // hosts
        assert np.concatenate(labels).tolist() == [
            3 * i % 10 for i in range(first, first + 16 // hosts)
        ]
    assert sorted(records_read) == list(range(0, COUNT, 3))


def test_fingerprints_are_of_version_and_lengths(data_dir):
    plain = TfdsSource("plain", data_dir).fingerprint("train")
    assert plain == TfdsSource("plain", data_dir, shuffle_buffer=24).fingerprint("train")
    assert plain["data set"].startswith("plain") and plain["records"] == COUNT
    some = TfdsSource("plain", data_dir, subset={"train": ["0.jpg", "99.jpg"]})
    others = TfdsSource("plain", data_dir, subset={"train": ["0.jpg", "98.jpg"]})
    assert some.fingerprint("train")["records"] == 2
    assert some.fingerprint("train") != others.fingerprint("train")
    half = TfdsSource("plain", data_dir).fingerprint("train[:50%]")
    assert half["records"] == COUNT // 2 and half != plain


def test_a_subset_that_cannot_be_found_is_an_error(data_dir):
    source = TfdsSource("plain", data_dir, subset={"train": ["0.jpg", "99.jpg"]})
    with pytest.raises(UserError, match=r"1 of 2 file names of config\.data\.subset.*'99\.jpg'"):
        train(source, 1, 1)
    with pytest.raises(UserError, match="no feature 'file_name'"):
        TfdsSource("digits", data_dir, subset={"train": ["0.jpg"]})


@pytest.mark.parametrize("name", ["plain", "at_will"])
def test_a_sample_of_a_large_split_is_drawn_from_a_part(data_dir, monkeypatch, name):
    """Otherwise all records would be read for their labels."""
    source = TfdsSource(name, data_dir)
    assert source.part("train", 5, 0) == "train"  # small enough
    monkeypatch.setattr(sources, "_MAX_CACHED_BYTES", 0)
    parts = [source.part("train", 5, seed) for seed in range(4)]
    assert all(source.count(part) == 5 for part in parts) and len(set(parts)) > 1
    assert source.part("train", source.count("train"), 0) == "train"
    assert source.part("train[10:25]", 5, 0) == "train[10:25]"
    some = SubsetSource(source, parts[0], [1, 3])
    whole = list(source.iter_images(parts[0]))
    assert list(some.iter_images(parts[0])) == [whole[1], whole[3]]
    assert some.part("train", 5, 1) == parts[1]


@pytest.mark.parametrize("name", ["digits", "plain", "at_will"])
def test_rules_of_pictures_hold_for_prepared_data_sets(data_dir, name):
    source = TfdsSource(name, data_dir, rules=decode.Rules(max_pixels=1))
    with pytest.raises(UserError, match=r"more than 0 .*config\.data\.max_pixels=1"):
        train(source, 1, 1)


@pytest.mark.parametrize("name", ["plain", "at_will"])
def test_parts_of_a_split_are_read(data_dir, name):
    source = TfdsSource(name, data_dir)
    assert source.count("train[10:25]") == 15
    stored = list(source.iter_images("train[10:25]"))
    assert [label for _, _, label in stored] == [i % 10 for i in range(10, 25)]
    assert stored[0][0].startswith(f"{name}-train.") and stored[0][0].endswith("__10")


@pytest.mark.parametrize(
    "name, small, cache",
    [("digits", True, False), ("plain", True, False), ("plain", False, True),
     ("at_will", True, False), ("at_will", False, False)],
)  # fmt: skip
@pytest.mark.parametrize("hosts", [1, 2])
def test_records_are_picked_out_in_any_order_by_any_host(
    data_dir, monkeypatch, name, small, cache, hosts
):
    """Rows may repeat, and earlier reads do not affect later ones."""
    if not small:
        monkeypatch.setattr(sources, "_MAX_CACHED_BYTES", 0)
    source = TfdsSource(name, data_dir, cache=cache, process_index=hosts - 1, process_count=hosts)
    whole = list(source.iter_images("train"))
    selected = [7, 40, 0, 7, len(whole) - 1, 23]
    for rows in (selected, selected[::-1], selected):
        assert list(source.take("train", rows)) == [whole[row] for row in rows]


def test_records_of_parts_and_subsets_are_picked_out(data_dir, monkeypatch):
    monkeypatch.setattr(sources, "_MAX_CACHED_BYTES", 0)
    for name in ("plain", "at_will"):
        source = TfdsSource(name, data_dir, subset={"train": [f"{i}.jpg" for i in (3, 5, 40)]})
        whole = list(source.iter_images("train"))
        assert list(source.take("train", [2, 0])) == [whole[2], whole[0]]
    source = TfdsSource("at_will", data_dir)
    assert [label for *_, label in source.take("train[10:25]", [4, 0])] == [4, 0]
    with pytest.raises(UserError, match="The split of at_will"):
        source.take("trian", ())


def test_a_large_split_of_tfrecord_files_is_refused_before_a_record_is_read(data_dir, monkeypatch):
    monkeypatch.setattr(sources, "_MAX_CACHED_BYTES", 0)
    monkeypatch.setattr(records.Rows, "_read_runs", None)  # fails if a record is read
    source = TfdsSource("plain", data_dir)
    bags = Bags(neighbours=np.zeros((COUNT, 1), np.int32))
    with pytest.raises(UserError, match=r"plain/1\.0\.0.*=array_record.*source='folder'"):
        BagSource(source, bags, (1,)).check("train")


def test_bags_of_array_records_are_read_batch_by_batch(data_dir, monkeypatch):
    """The other member is the next record; only the records of a batch are read."""
    monkeypatch.setattr(sources, "_MAX_CACHED_BYTES", 0)
    read, real = [], records.Rows.take
    monkeypatch.setattr(
        records.Rows, "take", lambda self, rows: read.append(len(rows)) or real(self, rows)
    )
    after = Bags(neighbours=((np.arange(COUNT)[:, None] + 1) % COUNT).astype(np.int32))
    whole_picture = {0: crop(scale=(1.0, 1.0)), 1: crop(scale=(1.0, 1.0))}

    def batches(source, start=START):
        bagged = BagSource(source, after, (1,))
        return list(itertools.islice(bagged.train("train", whole_picture, 6, 3, start, 0), 4))

    batches_read = batches(TfdsSource("at_will", data_dir))
    assert set(read) == {0, 12} and sum(read) == 4 * 12
    for batch in batches_read:
        first, second = (numbers(batch.views[view]) for view in (0, 1))
        assert second == [(n + 1) % COUNT for n in first]
        assert batch.labels.tolist() == [n % 10 for n in first]
    resumed = batches(TfdsSource("at_will", data_dir), batches_read[1].position)
    same_batches(resumed[:2], batches_read[2:])
    same_batches(batches(TfdsSource("plain", data_dir, cache=True)), batches_read)


def test_cache_keeps_what_is_large(data_dir, monkeypatch):
    monkeypatch.setattr(sources, "_MAX_CACHED_BYTES", 0)
    cached = train(TfdsSource("plain", data_dir, cache=True), 3)
    monkeypatch.undo()
    same_batches(train(TfdsSource("plain", data_dir), 3), cached)


def test_a_batch_larger_than_a_share_is_refused(data_dir):
    source = TfdsSource("plain", data_dir, process_index=0, process_count=2)
    with pytest.raises(UserError, match="between 1 and 24"):
        train(source, 1, 25)


# ---- pixels


def test_evaluation_equals_torchvisions(parity, tmp_path):
    path = parity / "augment" / "eval_a"
    params, stored = (
        json.loads(path.with_suffix(".json").read_text())["params"],
        np.load(f"{path}.npz"),
    )
    write(tmp_path, "one", {"test": [(encode(stored["image"], "PNG"), 3)]})
    source = TfdsSource("one", str(tmp_path))
    for i, p in enumerate(params):
        (batch,) = source.evaluate("test", p["crop"], p["resize"], p["interpolation"], 2)
        assert batch["label"].tolist() == [3, -1] and batch["mask"].tolist() == [True, False]
        difference = np.abs(batch["image"][0].astype(int) - stored[f"eval{i}_pil"])
        # Pillow rounds between its two passes, and clips there where bicubic overshoots.
        assert difference.max() <= (5 if p["interpolation"] == "bicubic" else 1)
        assert difference.mean() < 0.3


def test_formats_are_decoded_as_pillow_does(data_dir):
    source = TfdsSource("mixed", data_dir)
    assert source.num_classes is None
    (batch,) = source.evaluate("train", 24, 26, "bilinear", 4)
    assert batch["label"].tolist() == [-1] * 4
    noise = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3), np.uint8)
    for image, original in zip(
        batch["image"],
        (
            Image.open(io.BytesIO(encode(noise[0]))),
            Image.fromarray(noise[1]),
            Image.open(io.BytesIO(encode(noise[0, ..., 0]))),
            Image.fromarray(noise[1, ..., 0]),
        ),
        strict=True,
    ):
        want = decode.evaluated(np.asarray(original.convert("RGB")), 24, 26, "bilinear")
        assert np.abs(image.astype(int) - want).max() <= 1
    assert len(train(source, 3, 4)) == 3


# ---- evaluation


def test_evaluation_reads_everything_once_in_order(data_dir):
    source = TfdsSource("plain", data_dir)
    assert (source.name, source.num_classes, source.count("test")) == ("plain", 10, 10)
    batches = list(source.evaluate("test", 8, 0, "bilinear", 4))
    assert [b["mask"].sum() for b in batches] == [4, 4, 2]
    assert all(b["image"].shape == (4, 8, 8, 3) and b["label"].dtype == np.int32 for b in batches)
    mask = np.concatenate([b["mask"] for b in batches])
    assert numbers(np.concatenate([b["image"] for b in batches])[mask]) == list(range(10))
    assert np.concatenate([b["label"] for b in batches])[mask].tolist() == list(range(10))
    with pytest.raises(UserError, match="smaller than the crop"):
        source.evaluate("test", 8, 7, "bilinear", 4)


@pytest.mark.parametrize("name", ["plain", "at_will"])
@pytest.mark.parametrize(("hosts", "limit"), [(1, 0), (3, 0), (4, 0), (1, 5), (3, 5), (4, 2)])
def test_hosts_evaluate_everything_in_as_many_batches(data_dir, hosts, limit, name):
    records_read, batches = [], set()
    for host in range(hosts):
        source = TfdsSource(name, data_dir, process_index=host, process_count=hosts)
        host_batches = list(source.evaluate("test", 8, 0, "bilinear", 2, limit))
        batches.add(len(host_batches))
        records_read += [i for b in host_batches for i in numbers(b["image"][b["mask"]])]
    assert len(batches) == 1
    assert len(records_read) == len(set(records_read)) == (limit or 10)


# ---- damage

BAD = (2, 3, 11)  # records of the damaged data set
NAMES = [f"damaged-train.tfrecord-00000-of-00001__{i}" for i in BAD]


@pytest.fixture(params=[0, 1e9], ids=["streamed", "kept"])
def damaged(request, tmp_path, monkeypatch):
    """A function that opens 24 images, three of them an empty, a truncated and a text file."""
    monkeypatch.setattr(sources, "_MAX_CACHED_BYTES", request.param)
    good = [plain(i) for i in range(24)]
    bad = dict(zip(BAD, (b"", good[3][: len(good[3]) // 2], b"not a picture"), strict=True))
    records = [(bad.get(i, encoded), 0) for i, encoded in enumerate(good)]
    write(tmp_path, "damaged", {"train": records})
    return lambda **options: TfdsSource("damaged", str(tmp_path), **options)


def test_unreadable_records_are_skipped_and_named_once(damaged, caplog):
    source = damaged()
    with caplog.at_level(logging.WARNING):
        batches = train(source, 2 * 5 + 1, 4, limit=3)  # 21 pictures make 5 batches an epoch
    for epoch in (batches[:5], batches[5:10]):
        records_read = [i for b in epoch for i in numbers(b.views[0])]
        assert len(records_read) == len(set(records_read)) == 20 and not set(records_read) & set(
            BAD
        )
    assert sorted(name.split()[0] for name in source.unreadable) == sorted(NAMES)
    for name in NAMES:
        assert sum(name in line for line in caplog.messages) == 1


def test_reading_on_past_unreadable_records_repeats_the_rest(damaged):
    whole = train(damaged(), 12, 4, limit=3)
    assert any(b.position.offset % 4 for b in whole)
    for i in (2, 4, 7):
        same_batches(train(damaged(), 11 - i, 4, start=whole[i].position, limit=3), whole[i + 1 :])


def test_too_many_unreadable_records_are_an_error(damaged):
    with pytest.raises(
        UserError, match=r"more than 2 .*config\.data\.max_unreadable.*damaged-train\.tfrecord"
    ):
        train(damaged(), 7, 4, limit=2)


def test_evaluation_skips_and_names_unreadable_records(damaged):
    source = damaged(max_unreadable=3)
    batches = list(source.evaluate("train", 8, 0, "bilinear", 10))
    images = np.concatenate([b["image"][b["mask"]] for b in batches])
    assert numbers(images) == [i for i in range(24) if i not in BAD]
    assert [name.split()[0] for name in source.unreadable] == NAMES and len(batches) == 3
    with pytest.raises(UserError, match=r"3 records.*more than 2 .*max_unreadable"):
        list(damaged(max_unreadable=2).evaluate("train", 8, 0, "bilinear", 10))


def test_nothing_readable_is_an_error(tmp_path):
    # TFDS decodes the first record of the first split for its metadata.
    write(tmp_path, "bad", {"test": [(plain(0), 0)], "train": [(b"no", 0)] * 8})
    with pytest.raises(UserError):
        train(TfdsSource("bad", str(tmp_path)), 1, 4, limit=100)


@pytest.mark.parametrize("bytes_kept", [0, 1e9], ids=["streamed", "kept"])
@pytest.mark.parametrize("bad", [BAD, range(24)], ids=["some", "all"])
def test_small_images_that_are_unreadable(tmp_path, monkeypatch, bytes_kept, bad):
    monkeypatch.setattr(sources, "_MAX_CACHED_BYTES", bytes_kept)
    good = [encode(np.full((8, 8), 5 * i, np.uint8), "PNG") for i in range(24)]
    records = [(b"no picture" if i in bad else encoded, 0) for i, encoded in enumerate(good)]
    write(tmp_path, "small", {"test": [(good[0], 0)], "train": records}, shape=(8, 8, 1))
    source = TfdsSource("small", str(tmp_path))
    if bad != BAD:
        with pytest.raises(UserError, match="has 0"):
            train(source, 1, 7, limit=24)
        return
    whole = train(source, 6, 7, limit=3)
    assert [b.position.epoch for b in whole[2::3]] == [1, 2]
    records_read = [i for b in whole[:3] for i in numbers(b.views[0])]
    assert sorted(records_read) == [i for i in range(24) if i not in BAD]
    assert len(source.unreadable) == 3
    same_batches(train(source, 4, 7, start=whole[1].position, limit=3), whole[2:])


@pytest.mark.parametrize("bytes_kept", [0, 1e9], ids=["streamed", "kept"])
@pytest.mark.parametrize("task", ["train", "evaluate"])
@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_a_file_that_was_cut_short_is_an_error(tmp_path, monkeypatch, bytes_kept, task, kind):
    monkeypatch.setattr(sources, "_MAX_CACHED_BYTES", bytes_kept)
    pictures = [(plain(i), 0) for i in range(24)]
    folder = write(tmp_path, "cut", {"train": pictures}, files=2, kind=kind)
    path = folder / f"cut-train.{kind}-00001-of-00002"
    path.write_bytes(path.read_bytes()[:-3000])
    source = TfdsSource("cut", str(tmp_path), max_unreadable=100)
    with pytest.raises(UserError, match="cut"):
        if task == "train":
            train(source, 7, 4, limit=100)
        else:
            list(source.evaluate("train", 8, 0, "bilinear", 10))


# ---- finding a data set


def test_a_missing_data_set_says_what_is_there_and_how_to_prepare_it(data_dir, monkeypatch):
    with pytest.raises(
        UserError, match=r"Did you mean 'digits'.*at_will, digits, mixed, plain"
    ) as error:
        TfdsSource("digit", data_dir)
    assert data_dir in str(error.value) and "tfds build digit" in str(error.value)
    monkeypatch.setenv("TFDS_DATA_DIR", f"{data_dir}/none")
    with pytest.raises(UserError, match=r"no such directory.*TFDS_DATA_DIR"):
        TfdsSource("digits")
    with pytest.raises(UserError, match=r"ILSVRC2012_img_train\.tar.*downloads/manual"):
        TfdsSource("imagenet2012", data_dir)
    with pytest.raises(UserError, match="name=''"):
        TfdsSource("", data_dir)


def test_a_missing_split_is_named(data_dir):
    source = TfdsSource("digits", data_dir)
    with pytest.raises(UserError, match=r"Did you mean 'test'.*Allowed: test, train"):
        source.count("tests")
    with pytest.raises(UserError, match="bicubic"):
        train(source, 1, views={0: crop(interpolation="cubic")})


def test_the_highest_version_and_configs_are_found(data_dir, tmp_path, monkeypatch):
    original = pathlib.Path(data_dir) / "digits" / "1.0.0"
    for folder in ("some/9.0.0", "some/10.0.0", "other/small/1.0.0", "half/1.0.0"):
        (tmp_path / folder).mkdir(parents=True)
        if not folder.startswith("half"):
            for file in original.iterdir():
                (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert sources.find("some").name == "10.0.0"
    assert sources.find("other/small").name == "1.0.0"
    assert os.fspath(sources.find(str(original))) == str(original)
    assert sources.available() == ["other/small", "some"]
    with pytest.raises(UserError, match="not prepared"):
        sources.find("half")
    assert TfdsSource(str(original)).count("test") == 360


# ---- digits


def test_digits_are_written_once(data_dir, monkeypatch):
    source = TfdsSource("digits", data_dir)
    assert (source.count("train"), source.count("test"), source.num_classes) == (1437, 360, 10)
    labels = {}
    for split in ("train", "test"):
        batches = list(source.evaluate(split, 8, 0, "bilinear", 128))
        mask = np.concatenate([b["mask"] for b in batches])
        images = np.concatenate([b["image"] for b in batches])[mask]
        assert images.min() == 0 and images.max() == 255
        labels[split] = np.bincount(np.concatenate([b["label"] for b in batches])[mask])
    shares = labels["test"] / (labels["train"] + labels["test"])
    assert (np.abs(shares - 360 / 1797) < 0.005).all()
    monkeypatch.setattr(digits, "_load", lambda: pytest.fail("written twice"))
    assert digits.write(data_dir) == f"{data_dir}/digits/1.0.0"


def test_half_written_digits_do_not_count(tmp_path, monkeypatch):
    leftover = tmp_path / "digits" / "1.0.0"
    leftover.mkdir(parents=True)
    (leftover / "digits-train.tfrecord-00000-of-00001").write_bytes(b"half")
    assert digits.write(str(tmp_path)) == str(leftover)
    assert TfdsSource("digits", str(tmp_path)).count("train") == 1437
    assert [path.name for path in leftover.parent.iterdir()] == ["1.0.0"]
    monkeypatch.setattr(digits, "_write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        digits.write(str(tmp_path / "other"))
    assert not list((tmp_path / "other" / "digits").iterdir())


def test_digits_need_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"disco-jax\[demo\]"):
        digits.write(str(tmp_path))


def test_digits_are_not_registered_with_tfds(data_dir):
    _, tfds = sources.tensorflow()
    assert "digits" not in tfds.core.registered._DATASET_REGISTRY


# ---- prepared data sets, if available

PREPARED = os.environ.get("DISCO_JAX_TEST_TFDS", "")


@pytest.mark.skipif(not PREPARED, reason="DISCO_JAX_TEST_TFDS names no directory")
@pytest.mark.parametrize("name", ["fashion_mnist", "imagenet2012"])
def test_prepared_data_sets_are_read(name):
    if name not in sources.available(PREPARED):
        pytest.skip(f"{name} is not in {PREPARED}")
    source = TfdsSource(name, PREPARED)
    assert source.num_classes == {"fashion_mnist": 10, "imagenet2012": 1000}[name]
    views = {0: crop(24), 1: crop(24)}
    whole = train(source, 3, 16, views=views)
    same_batches(train(source, 2, 16, start=whole[0].position, views=views), whole[1:])
    split = "test" if name == "fashion_mnist" else "validation"
    (batch,) = source.evaluate(split, 24, 28, "bilinear", 20, limit=20)
    assert batch["mask"].all() and (batch["label"] >= 0).all()
    assert contract.evaluation_batches(source.count(split), 20, 20, 1) == 1
