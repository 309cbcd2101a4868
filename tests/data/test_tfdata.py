"""`config.data.reader="tfdata"`: the order, the boxes and nearly the pixels of the threads."""

import dataclasses
import io
import itertools
import os

import numpy as np
import pytest
from PIL import Image

from disco_jax.data import crops, digits, pipeline, sources, tfdata
from disco_jax.data.contract import Position
from disco_jax.data.data_settings import DataSettings
from disco_jax.data.sources import TfdsSource
from disco_jax.errors import UserError
from helpers import crop, same_batches
from prepared import encode, write

START = Position.start()
COUNT = 40
# One view for each filter; the last two are enlarged.
VIEWS = {
    0: crop(24),
    1: crop(9, scale=(0.05, 0.3), interpolation="bicubic"),
    2: crop(16, antialias="area"),
    3: crop(70, antialias="none"),
    4: crop(70, scale=(0.1, 1.0), interpolation="bicubic", antialias="area"),
}
# Largest mean difference of a crop in grey levels. TensorFlow's resize rounds once, Pillow's after
# each pass; OpenCV computes with 11 bits, and its cubic filter has a = -0.75 instead of -0.5.
MEAN = {0: 0.5, 1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5}
SHARP_MEAN = {**MEAN, 1: 1.5, 4: 6.0}  # at the edges of digits, where cubic filters overshoot


def smooth(seed):
    """Returns u8[H, W, 3] of soft colours, without the sharp edges at which filters differ."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    size = [(56, 80), (80, 56), (150, 40)][seed % 3]  # the last needs the fallback of some boxes
    return np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Directory with the digits and JPEGs in TFRecord and array_record files."""
    path = tmp_path_factory.mktemp("tfds")
    digits.write(str(path))
    jpegs = [(encode(smooth(i), quality=95), i % 10) for i in range(COUNT)]
    write(path, "plain", {"train": jpegs}, files=4)
    write(path, "at_will", {"train": jpegs}, files=3, kind="array_record")
    return str(path)


@pytest.fixture
def opened(data_dir, monkeypatch):
    """Function that opens a data set, which is held in memory or read from its files."""

    def open_one(name, in_memory, **options):
        monkeypatch.setattr(sources, "_MAX_CACHED_BYTES", 1e9 if in_memory else 0)
        return TfdsSource(name, data_dir, shuffle_buffer=16, **options)

    return open_one


def train(source, n, views, start=START, batch_size=7, limit=0):
    split = "train[:40]" if source.name == "digits" else "train"
    batches = source.train(split, views, batch_size, 3, start, limit)
    return list(itertools.islice(batches, n))


def assert_close(actual, expected, means=MEAN):
    """Asserts that batches have the same images, with similar pixels."""
    for a, b in zip(actual, expected, strict=True):
        assert a.position == b.position
        np.testing.assert_array_equal(a.rows, b.rows)
        np.testing.assert_array_equal(a.labels, b.labels)
        assert a.views.keys() == b.views.keys()
        for view, pixels in a.views.items():
            assert pixels.dtype == np.uint8 and pixels.shape == b.views[view].shape
            difference = np.abs(pixels.astype(int) - b.views[view])
            assert difference.mean(axis=(1, 2, 3)).max() < means[view], view


def test_boxes_are_those_of_the_threads():
    """Includes images without a fitting try, and a range of scales that fits seldom."""
    tf, _ = sources.tensorflow()
    rng = np.random.default_rng(0)
    views = {0: crop(), 3: crop(scale=(0.8, 1.0), ratio=(0.9, 1.1)), 4: crop(scale=(0.05, 0.14))}
    count = 2000
    height, width = np.exp(rng.uniform(0, 8, (2, count))).astype(np.int64)
    numbers = tfdata.Draws(views, seed=5, host=1).numbers(epoch=2, first=30, count=count)
    images = tf.data.Dataset.from_tensor_slices((numbers, height, width))
    boxed = images.map(lambda n, h, w: tf.stack([tfdata.box(n[i], h, w) for i in range(3)]))
    (boxes,) = boxed.batch(count).as_numpy_iterator()
    for column, (view, c) in enumerate(views.items()):
        draws = crops.uniforms(5, 2, 1, view, 30, count)
        expected = crops.boxes(draws, height, width, c.scale, c.ratio)
        np.testing.assert_array_equal(boxes[:, column], expected)


@pytest.mark.parametrize(
    ("name", "in_memory", "hosts"),
    [("digits", True, 1), ("plain", True, 2), ("plain", False, 1), ("plain", False, 2),
     ("at_will", False, 2)],
)  # fmt: skip
def test_batches_are_those_of_the_threads(opened, name, in_memory, hosts, caplog):
    host = dict(process_index=hosts - 1, process_count=hosts)
    threads, tensorflow = (
        train(opened(name, in_memory, reader=reader, **host), 7, VIEWS)
        for reader in ("threads", "tfdata")
    )
    assert [b.position.epoch for b in threads] == (
        [0, 0, 0, 0, 1, 1, 1] if hosts == 1 else [0, 1, 1, 2, 2, 3, 3]
    )
    assert_close(tensorflow, threads, SHARP_MEAN if name == "digits" else MEAN)
    assert not [r for r in caplog.records if r.name.startswith("disco_jax")]


@pytest.mark.parametrize("in_memory", [True, False])
def test_resuming_repeats_the_rest_exactly(opened, in_memory):
    options = dict(process_index=1, process_count=2, reader="tfdata")
    views = {0: VIEWS[0]}
    whole = train(opened("plain", in_memory, **options), 6, views)
    for i in (0, 3):
        again = opened("plain", in_memory, **options)
        same_batches(train(again, 5 - i, views, whole[i].position), whole[i + 1 :])


def test_a_subset_is_read(data_dir):
    names = {f"{i}.jpg" for i in range(0, COUNT, 3)}
    threads, tensorflow = (
        train(TfdsSource("plain", data_dir, subset={"train": names}, reader=reader), 2, VIEWS)
        for reader in ("threads", "tfdata")
    )
    assert_close(tensorflow, threads)


# ---- other images than plain JPEGs, and damage


def rotated(image):
    """Encodes an image whose EXIF orientation turns it by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(image, exif=exif.tobytes())


def cmyk(image):
    """Encodes a JPEG of four channels."""
    file = io.BytesIO()
    Image.fromarray(image).convert("CMYK").save(file, "JPEG", quality=95)
    return file.getvalue()


def without_tables(image):
    """Encodes a JPEG that ends as it should but has impossible Huffman tables."""
    encoded = encode(image)
    counts = encoded.index(b"\xff\xc4") + 5
    return encoded[:counts] + b"\xff" * 16 + encoded[counts + 16 :]


def test_other_images_and_damage_are_handled_as_by_threads(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sources, "_MAX_CACHED_BYTES", 0)
    images = [encode(smooth(i), quality=95) for i in range(24)]
    images[4] = encode(smooth(4)[..., 0])
    images[7] = encode(smooth(7), "PNG")
    images[9] = rotated(smooth(9))
    images[20] = cmyk(smooth(20))
    bad = {2: b"", 3: images[3][: len(images[3]) // 2], 11: b"text", 13: without_tables(smooth(13))}
    records = [(bad.get(i, encoded), i % 10) for i, encoded in enumerate(images)]
    write(tmp_path, "damaged", {"train": records})
    # Without the large view, threads would decode JPEGs at half their size.
    batches, names, views = {}, {}, {view: VIEWS[view] for view in (0, 3)}
    for reader in ("threads", "tfdata"):
        source = TfdsSource("damaged", str(tmp_path), reader=reader)
        batches[reader] = train(source, 5, views, batch_size=5, limit=4)
        names[reader] = sorted(source.unreadable)
    assert_close(batches["tfdata"], batches["threads"])
    assert names["tfdata"] == names["threads"] and len(names["threads"]) == 4
    assert "TensorFlow cannot decode record 13" in caplog.text
    assert "record 12" not in caplog.text and "record 14" not in caplog.text
    again = TfdsSource("damaged", str(tmp_path), reader="tfdata")
    rest = train(again, 3, views, batches["tfdata"][1].position, batch_size=5, limit=4)
    same_batches(rest, batches["tfdata"][2:])
    with pytest.raises(UserError, match=r"more than 3 .*config\.data\.max_unreadable"):
        source = TfdsSource("damaged", str(tmp_path), reader="tfdata")
        train(source, 5, views, batch_size=5, limit=3)


def test_a_file_cut_short_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_MAX_CACHED_BYTES", 0)
    pictures = [(encode(smooth(i)), 0) for i in range(24)]
    folder = write(tmp_path, "cut", {"train": pictures}, files=2)
    path = folder / "cut-train.tfrecord-00001-of-00002"
    path.write_bytes(path.read_bytes()[:-3000])
    source = TfdsSource("cut", str(tmp_path), reader="tfdata")
    with pytest.raises(UserError, match="prepare the data set again"):
        train(source, 7, VIEWS, batch_size=4, limit=100)


def test_a_failure_at_every_image_is_no_damage_of_the_images(data_dir, monkeypatch):
    tf, _ = sources.tensorflow()
    monkeypatch.setattr(tfdata, "_CHUNK", 3)
    monkeypatch.setattr(tfdata, "_jpeg", lambda *_: tf.io.decode_jpeg(b"no picture"))
    with pytest.raises(tf.errors.OpError, match="JPEG"):
        train(TfdsSource("plain", data_dir, reader="tfdata"), 5, {0: VIEWS[0]})


# ---- settings


def test_the_setting_reaches_the_source_and_is_for_tfds_alone(data_dir, tmp_path, monkeypatch):
    config = DataSettings(name="plain", dir=data_dir, reader="tfdata")
    monkeypatch.setattr(sources.TfdsSource, "_encoded_images", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(pipeline.open_source(config), 1, VIEWS)
    with pytest.raises(UserError, match=r"config\.data\.reader.*Did you mean 'tfdata'"):
        pipeline.open_source(dataclasses.replace(config, reader="tfdat"))
    with pytest.raises(UserError, match=r"config\.data\.reader='tfdata' has no effect"):
        pipeline.open_source(dataclasses.replace(config, source="folder", dir=str(tmp_path)))


# ---- photographs, if available

PREPARED = os.environ.get("DISCO_JAX_TEST_TFDS", "")


@pytest.mark.skipif(not PREPARED, reason="DISCO_JAX_TEST_TFDS names no directory")
def test_photographs_differ_by_rounding():
    if "imagenet2012" not in sources.available(PREPARED):
        pytest.skip(f"imagenet2012 is not in {PREPARED}")
    for antialias, mean in (("exact", 0.3), ("area", 0.3), ("none", 0.3)):
        views = {0: crop(224, antialias=antialias), 1: crop(96, antialias=antialias)}
        threads, tensorflow = (
            train(TfdsSource("imagenet2012", PREPARED, reader=reader), 2, views, batch_size=16)
            for reader in ("threads", "tfdata")
        )
        assert_close(tensorflow, threads, {0: mean, 1: mean})
