"""RKD: matches the student's distances and angles within a batch with the teacher's."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import Objective, Record, Term, Views
from disco_jax.ops.relations import rkd_angle, rkd_distance
from disco_jax.ops.vectors import l2_normalize


@dataclasses.dataclass(frozen=True)
class Relations(Objective):
    """Relational distillation on the unit embeddings of one view. RKD (arXiv:1904.05068).

    Attributes:
      weight: factor of the term in the method's loss.
      view: view encoded by student and teacher.
      distance: weight of the pairwise distances.
      angle: weight of the angles; its cost grows with the cube of `group`. DisCo's code uses 1 for
        distance and 1 for angle, RKD's paper 1 and 2 (disagreement A2).
      group: number of images among which relations are computed, a divisor of a device's batch; 0:
        a device's whole batch, so that the loss depends on the number of devices. DisCo's runs use
        32.
    """

    weight: float = 1.0
    view: int = 0
    distance: float = 1.0
    angle: float = 1.0
    group: int = 0

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return {"student": (self.view,), "teacher": (self.view,)}

    def __call__(self, record: Record, memory: tuple[()], step: Array) -> Term:
        student, teacher = (
            self._groups(l2_normalize(record.embedding(name, self.view)))
            for name in ("student", "teacher")
        )
        terms, loss = {}, jnp.zeros(())
        for name, relation in (("distance", rkd_distance), ("angle", rkd_angle)):
            if weight := getattr(self, name):
                terms[name] = jnp.mean(jax.vmap(relation)(student, teacher))
                loss += weight * terms[name]
        return Term(loss, memory, terms)

    def _groups(self, rows: Array) -> Array:
        """Reshapes f32[B, D] to f32[B / group, group, D]."""
        return rows.reshape(-1, self.group or len(rows), rows.shape[-1])
