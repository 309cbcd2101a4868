"""Sources by name, the device layout, and the prefetching thread."""

import dataclasses
import itertools
import threading
import time

import numpy as np
import pytest
from PIL import Image

from disco_jax.data import decode, pipeline
from disco_jax.data.data_settings import DataSettings
from disco_jax.data.pipeline import Prefetcher
from disco_jax.errors import UserError


def data(**changes):
    fields = dict(
        source="npz",
        name="",
        dir="",
        train_split="train",
        subset="",
        cache=False,
        shuffle_buffer=16,
        max_unreadable=0,
    )
    return DataSettings(**{**fields, "max_unreadable_percent": 0.0, **changes})


def test_sources_are_opened_by_name(tmp_path):
    np.savez(tmp_path / "a.npz", train_images=np.zeros((4, 5, 5), np.uint8))
    assert pipeline.open_source(data(dir=str(tmp_path / "a.npz"))).count("train") == 4
    with pytest.raises(UserError, match="no images"):
        pipeline.open_source(data(source="folder", dir=str(tmp_path)))
    with pytest.raises(UserError, match=r"config\.data\.source='tdfs'.*Did you mean 'tfds'"):
        pipeline.open_source(data(source="tdfs"))


def test_settings_of_the_data_reach_the_source(tmp_path):
    for name in ("one/a.png", "two/b.png", "train/c.png"):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(np.array([[0, 4095]], np.uint16)).save(tmp_path / name)
    labels = tmp_path / "labels.txt"
    labels.write_text("a.png,3\n")
    config = data(source="folder", dir=str(tmp_path), range="0,4095", max_pixels=2)
    config = dataclasses.replace(config, splits="train=one,test=two", labels=str(labels))
    source = pipeline.open_source(config)
    ((_, file, label),) = source.iter_images("train")
    assert label == 3 and decode.decode(file)[0, :, 0].tolist() == [0, 255]
    (batch,) = source.evaluate("test", 2, 0, "bilinear", 1)
    assert batch["image"].max() == 255
    config = dataclasses.replace(config, max_pixels=1)
    with pytest.raises(decode.Unreadable, match="max_pixels=1"):
        decode.decode(next(iter(pipeline.open_source(config).iter_images("train")))[1])
    for changes in (dict(range="image"), dict(splits="train=."), dict(labels="a.txt")):
        field = next(iter(changes))
        with pytest.raises(UserError, match=rf"config\.data\.{field}=.*has no effect"):
            pipeline.open_source(data(dir="a.npz", **changes))
    for percent in (-1.0, 101.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"max_unreadable_percent=.*0\.\.100"):
            pipeline.open_source(data(dir="a.npz", max_unreadable_percent=percent))
    config = dataclasses.replace(config, range="some")
    with pytest.raises(UserError, match=r"config\.data\.range='some'"):
        pipeline.open_source(config)


def test_a_list_of_file_names_makes_a_subset(tmp_path):
    for name in ("n01_1", "n01_2", "n02_3"):
        (tmp_path / "train" / name[:3]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "train" / name[:3] / f"{name}.JPEG")
    listed = tmp_path / "chosen.txt"
    listed.write_text("n01_2.JPEG\n\ntrain/n02/n02_3.JPEG \n")  # names or paths
    folder = data(source="folder", dir=str(tmp_path), subset=str(listed))
    assert pipeline.open_source(folder).count("train") == 2
    for text in ("\n", None):
        listed.write_text(text) if text else listed.unlink()
        with pytest.raises(UserError, match=r"config\.data\.subset"):
            pipeline.open_source(folder)
    np.savez(tmp_path / "a.npz", train_images=np.zeros((4, 5, 5), np.uint8))
    with pytest.raises(UserError, match=r"config\.data\.subset.*npz"):
        pipeline.open_source(data(dir=str(tmp_path / "a.npz"), subset=str(listed)))


def test_to_devices_splits_the_batch_of_every_leaf():
    tree = {"views": {0: np.arange(12).reshape(6, 2)}, "aux": {"ratio": np.arange(6)}}
    laid = pipeline.to_devices(tree, 3)
    np.testing.assert_array_equal(laid["views"][0], tree["views"][0].reshape(3, 2, 2))
    np.testing.assert_array_equal(laid["aux"]["ratio"], [[0, 1], [2, 3], [4, 5]])


def test_items_arrive_in_order_and_end():
    with Prefetcher(iter(range(20)), depth=3, transform=lambda i: 2 * i) as ready:
        assert list(ready) == list(range(0, 40, 2))
        with pytest.raises(StopIteration):
            next(ready)


@pytest.mark.parametrize("where", ["iterator", "transform"])
def test_an_exception_reaches_the_consumer_after_the_items_before_it(where):
    def numbers():
        yield from (1, 2)
        if where == "iterator":
            raise UserError("three")
        yield 3

    def checked(i):
        if i == 3:
            raise UserError("three")
        return i

    with Prefetcher(numbers(), transform=checked) as ready:
        assert [next(ready), next(ready)] == [1, 2]
        for _ in range(2):  # a second call raises again and does not hang
            with pytest.raises(UserError, match="three"):
                next(ready)


def test_no_more_than_depth_items_are_read_ahead():
    read = []

    def numbers():
        for i in itertools.count():
            read.append(i)
            yield i

    with Prefetcher(numbers(), depth=2) as ready:
        next(ready)
        time.sleep(0.3)
        assert len(read) <= 4  # one consumed, two queued, one held by the thread


def test_close_stops_the_thread_at_once():
    before = threading.active_count()
    ready = Prefetcher(itertools.count(), depth=2)
    next(ready)
    started = time.monotonic()
    ready.close()
    ready.close()
    assert time.monotonic() - started < 2
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(ready)


def test_only_the_consumers_waiting_is_counted():
    def slow():
        for i in range(3):
            time.sleep(0.1)
            yield i

    with Prefetcher(slow()) as ready:
        assert list(ready) == [0, 1, 2]
        assert 0.2 < ready.waited_s < 2
    with Prefetcher(iter(range(3)), depth=3) as ready:
        time.sleep(0.2)
        assert list(ready) == [0, 1, 2]
        assert ready.waited_s < 0.1
