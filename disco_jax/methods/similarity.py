"""SEED: the student's similarities to a queue of teacher embeddings copy the teacher's."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import Record, Term, Views, spread
from disco_jax.methods.contrast import inherits
from disco_jax.ops.collectives import gather
from disco_jax.ops.losses import soft_cross_entropy, unit
from disco_jax.ops.memory import Queue


@dataclasses.dataclass(frozen=True)
class Similarity:
    """Soft cross-entropy over a queue that the teacher fills. SEED (arXiv:2101.04731) eq. 5.

    The same view feeds both networks. The similarities use the queue as it is before this step's
    teacher embeddings enter it.

    Attributes:
      weight: of the term in the method's loss.
      view: the view that student and teacher encode.
      student_temperature: tau_S > 0.
      teacher_temperature: tau_T > 0; 0.01 is the paper's, 1e-4 the code's (disagreement S1).
      queue_size: teacher embeddings remembered; a multiple of the global batch.
      queue_init: "random" as SEED starts, "teacher" to start from the teacher's own queue.
    """

    weight: float = 1.0
    view: int = 0
    student_temperature: float = 0.2
    teacher_temperature: float = 0.01
    queue_size: int = 65_536
    queue_init: str = "random"

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return {"student": (self.view,), "teacher": (self.view,)}

    def init(self, rng: Array, record: Record, inherited: Queue | None) -> Queue:
        dim = record.embedding("teacher", self.view).shape[-1]
        if self.queue_init == "teacher" and inherits(inherited, self.queue_size, dim):
            return inherited
        return Queue.create(jax.random.fold_in(rng, self.view), self.queue_size, dim)

    def __call__(self, record: Record, memory: Queue, step: Array) -> Term:
        student = unit(record.embedding("student", self.view))
        teacher = unit(record.embedding("teacher", self.view))
        losses = soft_cross_entropy(
            student,
            teacher,
            memory.vectors,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )
        metrics = {
            "cosine": jnp.mean(jnp.sum(student * teacher, axis=-1)),
            "student_std": spread(student),
            "teacher_std": spread(teacher),
        }
        return Term(jnp.mean(losses), memory.push(gather(teacher)), metrics)
