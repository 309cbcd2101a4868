"""Regression of the teacher's embedding: DisCo, SimReg and SEED's squared-distance baseline."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import Objective, Record, Term, Views, embedding_std
from disco_jax.methods.rules import check_choice
from disco_jax.ops.losses import squared_distance
from disco_jax.ops.vectors import l2_normalize

REDUCTIONS = ("mean", "sum")


@dataclasses.dataclass(frozen=True)
class Distill(Objective):
    """Squared distance of unit embeddings on each view. DisCo (arXiv:2104.09124) eq. 1.

    Attributes:
      weight: factor of the term. The paper states 1. The official code sums over the 32 images of
        each of 8 devices and averages the gradients, which is weight 32 on the mean (disagreement
        D1).
      views: student views to compare; their losses are summed.
      reduction: "mean" over the batch, or "sum" over this replica's batch, as in the official code,
        which makes the effective weight depend on the number of devices.
      teacher_output: "embedding" or "features". SimReg (arXiv:2201.05131) regresses the teacher's
        features after pooling; for unit vectors the squared distance equals its 2 - 2 cos.
      teacher_views: the teacher view for each of `views`; (): the same views.
      teacher_unit: whether the teacher's embedding is also scaled to length 1. DisCo's code for
        SwAV compares the student's unit embedding with the teacher's unscaled one (disagreement
        W1).
    """

    weight: float = 32.0
    views: tuple[int, ...] = (0, 1)
    reduction: str = "mean"
    teacher_output: str = "embedding"
    teacher_views: tuple[int, ...] = ()
    teacher_unit: bool = True

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return {"student": self.views, "teacher": self.teacher_views or self.views}

    def check_settings(self, setting: str, batch_size: int) -> None:
        super().check_settings(setting, batch_size)
        check_choice(f"{setting}.reduction", self.reduction, REDUCTIONS)

    def network_output(self, network: str) -> str:
        return self.teacher_output if network == "teacher" else "embedding"

    def match_width(self) -> str:
        return self.teacher_output

    def __call__(self, record: Record, memory: tuple[()], step: Array) -> Term:
        reduce = jnp.mean if self.reduction == "mean" else jnp.sum
        losses, cosines = [], []
        for view, teacher_view in zip(self.views, self.teacher_views or self.views, strict=True):
            student = l2_normalize(record.embedding("student", view))
            raw = record.output("teacher", teacher_view, self.teacher_output)
            teacher = l2_normalize(raw)
            target = teacher if self.teacher_unit else raw
            losses.append(reduce(squared_distance(student, target)))
            cosines.append(jnp.mean(jnp.sum(student * teacher, axis=-1)))
        metrics = {
            "cosine": jnp.mean(jnp.stack(cosines)),
            "student_std": embedding_std(student),
            "teacher_std": embedding_std(teacher),
        }
        return Term(jnp.sum(jnp.stack(losses)), memory, metrics)
