"""Barlow Twins between student and teacher: matches embeddings dimension by dimension."""

import dataclasses

from jax import Array

from disco_jax import errors
from disco_jax.methods.base import Objective, Record, Term, Views, embedding_std
from disco_jax.ops.losses import cross_correlation_loss
from disco_jax.ops.vectors import l2_normalize


@dataclasses.dataclass(frozen=True)
class CrossCorrelation(Objective):
    """Cross-correlation of student and teacher. Barlow Twins (arXiv:2103.03230) eq. 1.

    The correlations are those of the global batch, so the loss does not depend on the number of
    devices.

    Attributes:
      weight: factor of the term in the method's loss.
      view: view encoded by student and teacher.
      redundancy: lambda >= 0, the weight of off-diagonal correlations; 5e-3 in the paper.
    """

    weight: float = 1.0
    view: int = 0
    redundancy: float = 5e-3

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return {"student": (self.view,), "teacher": (self.view,)}

    def match_width(self) -> str:
        return "embedding"

    def check(self, setting: str, record: Record) -> None:
        if self.redundancy < 0:
            raise errors.UserError(f"{setting}.redundancy={self.redundancy} must be at least 0.")

    def __call__(self, record: Record, memory: tuple[()], step: Array) -> Term:
        student = record.embedding("student", self.view)
        teacher = record.embedding("teacher", self.view)
        loss = cross_correlation_loss(student, teacher, redundancy=self.redundancy)
        metrics = {
            "student_std": embedding_std(l2_normalize(student)),
            "teacher_std": embedding_std(l2_normalize(teacher)),
        }
        return Term(loss, memory, metrics)
