"""BYOL: a view's prediction regresses the EMA copy's embedding of another view."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from disco_jax import errors
from disco_jax.methods.base import Objective, Record, Term, Views, embedding_std
from disco_jax.ops.losses import squared_distance
from disco_jax.ops.vectors import l2_normalize


@dataclasses.dataclass(frozen=True)
class Byol(Objective):
    """Squared distance of unit predictions to unit targets. BYOL (arXiv:2006.07733) eq. 2.

    Attributes:
      weight: factor of the term in the method's loss.
      pairs: (predicting view, target view) pairs; their losses are added. The student predicts, the
        momentum network encodes the target.
    """

    weight: float = 1.0
    pairs: tuple[tuple[int, int], ...] = ((0, 1), (1, 0))

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        students, targets = zip(*self.pairs, strict=True)
        return {"student": students, "momentum": targets}

    def check(self, setting: str, record: Record) -> None:
        if record.encoded["student"][self.pairs[0][0]].prediction is None:
            raise errors.UserError(
                f"{setting} compares predictions, but the student has no predictor. Set "
                "config.student.predictor to its width, e.g. 4096."
            )

    def __call__(self, record: Record, memory: tuple[()], step: Array) -> Term:
        losses = []
        for view, target_view in self.pairs:
            prediction = l2_normalize(record.prediction("student", view))
            target = l2_normalize(record.embedding("momentum", target_view))
            losses.append(jnp.mean(squared_distance(prediction, target)))
        metrics = {
            "prediction_std": embedding_std(prediction),
            "target_std": embedding_std(target),
        }
        return Term(jnp.sum(jnp.stack(losses)), memory, metrics)
