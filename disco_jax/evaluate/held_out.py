"""Held-out training images: they are read with the others, but nothing learns from them."""

from typing import Any

import jax
import numpy as np

from disco_jax.data import contract
from disco_jax.data.contract import Source
from disco_jax.data.subset import SubsetSource

SPLIT = "held_out"  # the split of `HeldOut` with the held-out images


class Marked:
    """Source whose training batches mark held-out images."""

    def __init__(self, source: Source, split: str, mask: np.ndarray):
        """Wraps `source`; rows of `split` with a true `mask`, bool[N], are held out."""
        self._source, self._split, self._mask = source, split, mask

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def train(self, split: str, *args: Any) -> contract.Batches:
        """Yields the batches of the source; `aux["learned"]` is f32[b], 0 for held-out images."""
        assert split == self._split
        for batch in self._source.train(split, *args):
            learned = (~self._mask[batch.rows]).astype(np.float32)
            yield batch._replace(aux={**batch.aux, "learned": learned})


class HeldOut(Marked):
    """`Marked` with a further split, `SPLIT`, that has the held-out images."""

    def __init__(self, source: Source, split: str, mask: np.ndarray):
        """Wraps `source`, see `Marked`; keeps the held-out images in memory, encoded as stored."""
        super().__init__(source, split, mask)
        self._few = subset(source, split, mask)

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return [*self._source.splits, SPLIT]

    def count(self, split: str) -> int:
        """Returns the number of images of a split; that to train on includes the held-out ones."""
        return self._of(split).count(self._name(split))

    def iter_images(self, split: str) -> Any:
        """Yields every image of a split; see `contract.Source`."""
        return self._of(split).iter_images(self._name(split))

    def evaluate(self, split: str, *args: Any) -> Any:
        """Yields the center crop of every image of a split; see `contract.Source`."""
        return self._of(split).evaluate(self._name(split), *args)

    def _of(self, split: str) -> Source:
        return self._few if split == SPLIT else self._source

    def _name(self, split: str) -> str:
        return self._split if split == SPLIT else split


def subset(source: Source, split: str, mask: np.ndarray) -> SubsetSource:
    """Returns a source whose `split` has only the rows with a true `mask`, bool[N]."""
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    return SubsetSource(source, split, np.flatnonzero(mask), **hosts)
