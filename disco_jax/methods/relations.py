"""RKD: the student's distances and angles within a batch copy the teacher's."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import Objective, Record, Term, Views
from disco_jax.ops.losses import unit
from disco_jax.ops.relations import rkd_angle, rkd_distance


@dataclasses.dataclass(frozen=True)
class Relations(Objective):
    """Relational distillation on the unit embeddings of one view. RKD (arXiv:1904.05068).

    Attributes:
      weight: of the term in the method's loss.
      view: that student and teacher encode.
      distance: weight of the pairwise distances.
      angle: weight of the angles; its cost grows with the cube of the group. DisCo's code takes 1
        and 1, RKD's paper 1 and 2 (disagreement A2).
      group: images among which relations are taken, a divisor of a device's batch; 0: all of a
        device's, so that the loss depends on the number of devices. DisCo's runs have 32.
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
            self._groups(unit(record.embedding(name, self.view))) for name in ("student", "teacher")
        )
        terms, total = {}, jnp.zeros(())
        for name, loss in (("distance", rkd_distance), ("angle", rkd_angle)):
            if weight := getattr(self, name):
                terms[name] = jnp.mean(jax.vmap(loss)(student, teacher))
                total += weight * terms[name]
        return Term(total, memory, terms)

    def _groups(self, rows: Array) -> Array:
        """f32[B, D] -> f32[G, group, D]."""
        return rows.reshape(-1, self.group or len(rows), rows.shape[-1])
