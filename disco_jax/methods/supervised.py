"""Supervised classification, the upper bound that the papers' tables list."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import LABEL, Objective, Record, Term, Views, embedding_std
from disco_jax.ops.losses import class_cross_entropy
from disco_jax.ops.vectors import l2_normalize


@dataclasses.dataclass(frozen=True)
class Supervised(Objective):
    """Cross-entropy of an image's class. The head's last layer is the classifier.

    The class scores are the student's embedding, so that `config.student.dim` is the number of
    classes; with `config.student.hidden=0` the classifier is one linear layer on the features.

    Attributes:
      weight: factor of the term in the method's loss.
      view: view encoded by the student.
    """

    aux: ClassVar[tuple[str, ...]] = (LABEL,)

    weight: float = 1.0
    view: int = 0

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return {"student": (self.view,)}

    def __call__(self, record: Record, memory: tuple[()], step: Array) -> Term:
        scores, labels = record.embedding("student", self.view), record.aux[LABEL]
        correct = jnp.argmax(scores, axis=-1) == labels
        metrics = {
            "accuracy": jnp.mean(correct.astype(jnp.float32)),
            "student_std": embedding_std(l2_normalize(scores)),
        }
        return Term(jnp.mean(class_cross_entropy(scores, labels)), memory, metrics)
