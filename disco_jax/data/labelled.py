"""Batches that carry the classes of their images, for objectives that read labels."""

from collections.abc import Mapping
from typing import Any

from disco_jax.data import contract
from disco_jax.errors import UserError


class LabelledSource:
    """A `contract.Source` whose training batches have the classes in `HostBatch.aux`.

    Everything except `train` is delegated to the wrapped source.
    """

    def __init__(self, source: contract.Source, key: str):
        """Wraps `source`.

        Args:
          source: source of the images.
          key: the name of the classes in `HostBatch.aux`.
        """
        self._source, self._key = source, key

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def check(self, split: str, scores: int) -> None:
        """Checks that the source has labels, and at most as many classes as class scores.

        Raises:
          UserError: it has not.
        """
        if self._source.num_classes is None:
            raise self._unlabelled(split)
        if self._source.num_classes > scores:
            raise UserError(
                f"config.student.dim={scores} class scores are fewer than the "
                f"{self._source.num_classes} classes of {self._source.name}: set "
                f"config.student.dim={self._source.num_classes}."
            )

    def train(
        self,
        split: str,
        views: Mapping[int, Any],
        batch_size: int,
        seed: int,
        start: contract.Position,
        max_unreadable: int,
    ) -> contract.Batches:
        """Yields batches of random resized crops; see `contract.Source`.

        Raises:
          UserError: an image has no label.
        """
        batches = self._source.train(split, views, batch_size, seed, start, max_unreadable)
        try:
            for batch in batches:
                if (batch.labels < 0).any():
                    raise self._unlabelled(split)
                yield batch._replace(aux={**batch.aux, self._key: batch.labels})
        finally:
            batches.close()

    def _unlabelled(self, split: str) -> UserError:
        return UserError(
            f"Split {split!r} of {self._source.name} has images without a label, but "
            "config.objectives.supervised needs labels. A folder needs one sub-folder per class."
        )
