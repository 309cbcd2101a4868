"""Binary contrast with a queue of teacher embeddings: a baseline of SEED."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import Objective, Record, Term, Views, embedding_std
from disco_jax.ops.collectives import gather, pmean
from disco_jax.ops.losses import binary_contrast, mean_potential
from disco_jax.ops.memory import Queue
from disco_jax.ops.vectors import l2_normalize


@dataclasses.dataclass(frozen=True)
class BinaryContrast(Objective):
    """One binary decision per queue row. SEED (arXiv:2101.04731), appendix; CRD eq. 17-18.

    Attributes:
      weight: factor of the term in the method's loss.
      view: view encoded by student and teacher.
      temperature: tau > 0; SEED does not state it, CRD uses 0.07.
      queue_size: number of past teacher embeddings; a multiple of the global batch.
    """

    weight: float = 1.0
    view: int = 0
    temperature: float = 0.07
    queue_size: int = 65_536

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return {"student": (self.view,), "teacher": (self.view,)}

    def match_width(self) -> str:
        return "embedding"

    def init(self, rng: Array, record: Record, inherited: Queue | None) -> Queue:
        dim = record.embedding("teacher", self.view).shape[-1]
        return Queue.create(rng, self.queue_size, dim)

    def __call__(self, record: Record, memory: Queue, step: Array) -> Term:
        student = l2_normalize(record.embedding("student", self.view))
        teacher = l2_normalize(record.embedding("teacher", self.view))
        # CRD's code computes it on the first batch only; here it is updated in every step.
        potential = mean_potential(student, memory.vectors, temperature=self.temperature)
        losses = binary_contrast(
            student,
            teacher,
            memory.vectors,
            temperature=self.temperature,
            potential=pmean(potential),
        )
        metrics = {"cosine": jnp.mean(jnp.sum(student * teacher, axis=-1))}
        metrics["student_std"] = embedding_std(student)
        return Term(jnp.mean(losses), memory.push(gather(teacher)), metrics)
