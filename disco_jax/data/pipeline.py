"""From a config to device-ready batches: sources by name, device layout, prefetch."""

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
from disco_jax.data.base import Source, contents
from disco_jax.data.base import unreadable_limit as limit_of
from disco_jax.errors import UserError, unknown

_LOG = logging.getLogger(__name__)

SOURCES = ("tfds", "folder", "npz")
# Fields of `config.data` that are of some sources alone, and their default.
_OF_KINDS = (
    ("splits", "", ("folder",)),
    ("labels", "", ("folder",)),
    ("range", "full", ("folder", "tfds")),
)


def open_source(data: Any, *, shared: bool = True, tell: bool = True) -> Source:
    """The source that `config.data` describes.

    Args:
      data: `config.data`.
      shared: each host reads its own part; False: every host reads everything.
      tell: whether the first host logs what the data set has, and what is there and not used.

    Raises:
      UserError: an unknown kind of source, or one that is not there.
    """
    source = _opened(data, shared)
    if tell and jax.process_index() == 0:
        for line in contents(source):
            _LOG.info("%s", line)
    return source


def _opened(data: Any, shared: bool) -> Source:
    """The source, nothing said."""
    _check_fields(data)
    hosts = dict(
        process_index=jax.process_index() if shared else 0,
        process_count=jax.process_count() if shared else 1,
    )
    common = dict(
        **hosts,
        max_unreadable=data.max_unreadable,
        max_unreadable_percent=data.get("max_unreadable_percent", 0.0),
        rules=decode.Rules.parse(
            data.get("range", "full"), data.get("max_pixels", decode.MAX_PIXELS)
        ),
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
        raise UserError(f"config.data.source={data.source!r} reads config.data.dir: set it.")
    if data.source == "folder":
        from disco_jax.data.folders import FolderSource

        return FolderSource(
            data.dir,
            subset=_subset(data),
            splits=data.get("splits", ""),
            labels=data.get("labels", ""),
            **common,
        )
    if data.subset:
        raise UserError(
            f"config.data.subset={data.subset!r} picks files by name; the images of an .npz file "
            "have none. Leave it empty."
        )
    from disco_jax.data.arrays import ArraySource

    return ArraySource.from_npz(data.dir, **hosts)


def _check_fields(data: Any) -> None:
    """Refuses fields that would do nothing for this kind of source, or mean nothing."""
    percent = data.get("max_unreadable_percent", 0.0)
    if not 0 <= percent <= 100:
        raise UserError(f"config.data.max_unreadable_percent={percent} must lie in 0..100.")
    for field, usual, kinds in _OF_KINDS:
        given = data.get(field, usual)
        if given != usual and data.source in SOURCES and data.source not in kinds:
            raise UserError(
                f"config.data.{field}={given!r} does nothing with config.data.source="
                f"{data.source!r}; it is for {' and '.join(kinds)}. Set it to {usual!r}."
            )


def unreadable_limit(data: Any, source: Source, split: str) -> int:
    """How many records of a split this host may skip before it is an error.

    Args:
      data: `config.data`.
      source: of the split.
      split: e.g. "train".
    """
    share = source.count(split) // jax.process_count()
    percent = data.get("max_unreadable_percent", 0.0)
    return limit_of(share, data.max_unreadable, percent)


def _subset(data: Any) -> dict[str, frozenset[str]]:
    """Split -> names, from the list that `config.data.subset` names; {} without one."""
    if not data.subset:
        return {}
    lines = lists.read(data.subset, "config.data.subset")
    return {data.train_split: frozenset(pathlib.PurePath(line.file).name for line in lines)}


def to_devices(tree: Any, local_devices: int) -> Any:
    """[b, ...] of a host -> [local_devices, b / local_devices, ...], for every leaf."""
    return jax.tree.map(
        lambda x: np.reshape(x, (local_devices, len(x) // local_devices, *x.shape[1:])), tree
    )


class Prefetcher:
    """An iterator that works ahead in a thread of its own.

    Attributes:
      waited_s: seconds that the consumer has waited for items.
    """

    def __init__(
        self,
        iterator: Iterator[Any],
        depth: int = 2,
        transform: Callable[[Any], Any] = lambda item: item,
    ):
        """Starts at once.

        Args:
          iterator: what to read; only the thread touches it.
          depth: items kept ready.
          transform: applied to each item in the thread.
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
        """Ends the thread; what it had ready is dropped."""
        self._stop.set()
        self._thread.join(timeout=10)
        self._ended = StopIteration()

    def _fill(self, iterator: Iterator[Any], transform: Callable[[Any], Any]) -> None:
        try:
            for item in iterator:
                if not self._put((transform(item), None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:  # whatever reading raises belongs to the consumer
            self._put((None, error))

    def _put(self, entry: tuple[Any, BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
