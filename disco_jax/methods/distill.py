"""DisCo's distillation: the student's final embedding copies the teacher's."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import Record, Term, Views, spread
from disco_jax.ops.losses import squared_distance, unit
from disco_jax.ops.memory import Queue

REDUCTIONS = ("mean", "sum")


@dataclasses.dataclass(frozen=True)
class Distill:
    """Squared distance of unit embeddings on each view. DisCo (arXiv:2104.09124) eq. 1.

    Attributes:
      weight: of the term. The paper prints 1; the official code sums over the 32 images of each
        of 8 devices and averages the gradients, which is weight 32 on the mean (disagreement D1).
      views: on which student and teacher are compared; their losses are added.
      reduction: "mean" over the batch; "sum" over this replica's batch, as the official code
        writes it, which makes the effective weight depend on the number of devices.
      teacher_unit: whether the teacher's embedding is scaled to length 1 too. DisCo's code for
        SwAV compares unit students with the teacher's embedding as it is (disagreement W1).
    """

    weight: float = 32.0
    views: tuple[int, ...] = (0, 1)
    reduction: str = "mean"
    teacher_unit: bool = True

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return {"student": self.views, "teacher": self.views}

    def init(self, rng: Array, record: Record, inherited: Queue | None) -> tuple[()]:
        return ()

    def __call__(self, record: Record, memory: tuple[()], step: Array) -> Term:
        reduce = jnp.mean if self.reduction == "mean" else jnp.sum
        losses, cosines = [], []
        for view in self.views:
            student = unit(record.embedding("student", view))
            raw = record.embedding("teacher", view)
            teacher = unit(raw)
            target = teacher if self.teacher_unit else raw
            losses.append(reduce(squared_distance(student, target)))
            cosines.append(jnp.mean(jnp.sum(student * teacher, axis=-1)))
        metrics = {
            "cosine": jnp.mean(jnp.stack(cosines)),
            "student_std": spread(student),
            "teacher_std": spread(teacher),
        }
        return Term(jnp.sum(jnp.stack(losses)), memory, metrics)
