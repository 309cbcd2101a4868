"""The input pipeline: opens the source of a config, lays out batches for devices, prefetches."""

import logging
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from disco_jax.data import decode, lists
from disco_jax.data.contract import Source, contents
from disco_jax.data.contract import unreadable_limit as base_unreadable_limit
from disco_jax.data.data_settings import DataSettings
from disco_jax.errors import UserError, unknown

_LOG = logging.getLogger(__name__)

SOURCES = ("tfds", "folder", "npz")
# Fields of `config.data` that only some sources support: (field, default, sources).
_SOURCE_FIELDS = (
    ("splits", "", ("folder",)),
    ("labels", "", ("folder",)),
    ("range", "full", ("folder", "tfds")),
)


def open_source(data: DataSettings, *, shared: bool = True, tell: bool = True) -> Source:
    """Opens the source that `config.data` describes.

    Args:
      data: `config.data`.
      shared: whether each host reads only its own share; if False, every host reads everything.
      tell: whether host 0 logs the contents of the data set and the files that are not used.

    Raises:
      UserError: the kind of source is unknown, or the data set does not exist.
    """
    source = _create(data, shared)
    if tell and jax.process_index() == 0:
        for line in contents(source):
            _LOG.info("%s", line)
    return source


def _create(data: DataSettings, shared: bool) -> Source:
    """Opens the source without logging its contents."""
    _check_fields(data)
    hosts = dict(
        process_index=jax.process_index() if shared else 0,
        process_count=jax.process_count() if shared else 1,
    )
    common: dict[str, Any] = dict(
        **hosts,
        max_unreadable=data.max_unreadable,
        max_unreadable_percent=data.max_unreadable_percent,
        rules=decode.Rules.parse(data.range, data.max_pixels),
    )
    if data.source == "tfds":
        from disco_jax.data.sources import TfdsSource

        return TfdsSource(
            data.name,
            data.dir,
            cache=data.cache,
            shuffle_buffer=data.shuffle_buffer,
            subset=_subset(data),
            **common,
        )
    if data.source not in SOURCES:
        raise unknown("config.data.source", data.source, SOURCES)
    if not data.dir:
        raise UserError(f"config.data.source={data.source!r} needs config.data.dir: set it.")
    if data.source == "folder":
        from disco_jax.data.folders import FolderSource

        return FolderSource(
            data.dir,
            subset=_subset(data),
            splits=data.splits,
            labels=data.labels,
            **common,
        )
    if data.subset:
        raise UserError(
            f"config.data.subset={data.subset!r} selects files by name, but the images of an .npz "
            "file have no names. Leave it empty."
        )
    from disco_jax.data.arrays import ArraySource

    return ArraySource.from_npz(data.dir, **hosts)


def _check_fields(data: DataSettings) -> None:
    """Raises UserError for fields that are invalid or have no effect on this kind of source."""
    percent = data.max_unreadable_percent
    if not 0 <= percent <= 100:
        raise UserError(f"config.data.max_unreadable_percent={percent} must lie in 0..100.")
    for field, default, kinds in _SOURCE_FIELDS:
        value = getattr(data, field)
        if value != default and data.source in SOURCES and data.source not in kinds:
            raise UserError(
                f"config.data.{field}={value!r} has no effect with config.data.source="
                f"{data.source!r}; it is for {' and '.join(kinds)}. Set it to {default!r}."
            )


def unreadable_limit(data: DataSettings, source: Source, split: str) -> int:
    """Returns the number of unreadable records of a split that this host tolerates.

    Args:
      data: `config.data`.
      source: source of the split.
      split: name of the split, e.g. "train".
    """
    share = source.count(split) // jax.process_count()
    percent = data.max_unreadable_percent
    return base_unreadable_limit(share, data.max_unreadable, percent)


def _subset(data: DataSettings) -> dict[str, frozenset[str]]:
    """Reads the list `config.data.subset` as split -> file names; {} if it is not set."""
    if not data.subset:
        return {}
    lines = lists.read(data.subset, "config.data.subset")
    return {data.train_split: frozenset(pathlib.PurePath(line.file).name for line in lines)}


def to_devices(tree: Any, local_devices: int) -> Any:
    """Reshapes every leaf from [b, ...] to [local_devices, b / local_devices, ...]."""
    return jax.tree.map(
        lambda x: np.reshape(x, (local_devices, len(x) // local_devices, *x.shape[1:])), tree
    )


class Prefetcher:
    """An iterator that prefetches items in a background thread.

    Attributes:
      waited_s: total time the consumer has waited for items, in seconds.
    """

    def __init__(
        self,
        iterator: Iterator[Any],
        depth: int = 2,
        transform: Callable[[Any], Any] = lambda item: item,
    ):
        """Starts the background thread immediately.

        Args:
          iterator: iterator to prefetch from; only the background thread uses it.
          depth: maximum number of prefetched items.
          transform: function applied to each item in the background thread.
        """
        self.waited_s = 0.0
        self._ready: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._fill, args=(iterator, transform), daemon=True)
        self._thread.start()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Any:
        if self._ended is not None:
            raise self._ended
        started = time.monotonic()
        item, error = self._ready.get()
        self.waited_s += time.monotonic() - started
        if error is not None:
            self._ended = error
            raise error
        return item

    def close(self) -> None:
        """Stops the background thread and drops prefetched items."""
        self._stop.set()
        self._thread.join(timeout=10)
        self._ended = StopIteration()

    def _fill(self, iterator: Iterator[Any], transform: Callable[[Any], Any]) -> None:
        try:
            for item in iterator:
                if not self._put((transform(item), None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:  # re-raised in the consumer
            self._put((None, error))

    def _put(self, entry: tuple[Any, BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
