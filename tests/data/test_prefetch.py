"""Cases that could hang: threads that end early, and sources without a location."""

import itertools
import threading
import time

import pytest

from disco_jax.data import pipeline
from disco_jax.data.data_settings import DataSettings
from disco_jax.data.pipeline import Prefetcher
from disco_jax.errors import UserError


def test_close_ends_a_producer_that_waits_for_room():
    read = []

    def numbers():
        for i in itertools.count():
            read.append(i)
            yield i

    with Prefetcher(numbers(), depth=1) as ready:
        while len(read) < 2:  # one queued, one held by the thread
            time.sleep(0.01)
    assert not ready._thread.is_alive()
    num_read = len(read)
    time.sleep(0.2)
    assert len(read) == num_read


def test_close_ends_a_producer_that_is_reading():
    go_on, started = threading.Event(), threading.Event()

    def numbers():
        started.set()
        go_on.wait(5)
        yield 1

    ready = Prefetcher(numbers())
    started.wait(5)
    threading.Timer(0.2, go_on.set).start()
    ready.close()
    assert not ready._thread.is_alive()
    with pytest.raises(StopIteration):
        next(ready)


def test_the_thread_ends_after_an_error():
    ready = Prefetcher(iter([0, 1]), transform=lambda i: 1 // i)
    with pytest.raises(ZeroDivisionError):
        next(ready)
    ready._thread.join(5)
    assert not ready._thread.is_alive()
    ready.close()


def test_even_an_exit_in_the_thread_reaches_the_consumer():
    def numbers():
        yield 1
        raise SystemExit(3)

    with Prefetcher(numbers()) as ready:
        assert next(ready) == 1
        with pytest.raises(SystemExit):
            next(ready)


def test_transform_runs_in_the_thread():
    with Prefetcher(iter(range(3)), transform=lambda i: (i, threading.get_ident())) as ready:
        (first, ident), *_ = ready
    assert first == 0 and ident != threading.get_ident()


@pytest.mark.parametrize("source", ["folder", "npz"])
def test_a_source_without_a_place_is_refused(source):
    data = DataSettings(source=source)
    with pytest.raises(UserError, match=r"config\.data\.dir"):
        pipeline.open_source(data)
