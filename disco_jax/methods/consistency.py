"""ReSSL: matches a view's similarities to past images with those of a weakly augmented view."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import Objective, Record, Term, Views, embedding_std
from disco_jax.ops.collectives import gather
from disco_jax.ops.memory import Queue
from disco_jax.ops.relations import bank_cross_entropy
from disco_jax.ops.vectors import l2_normalize


@dataclasses.dataclass(frozen=True)
class Consistency(Objective):
    """Cross-entropy of similarities to a queue of keys. ReSSL (arXiv:2107.09282) eq. 5.

    Attributes:
      weight: factor of the term in the method's loss.
      query_view: view encoded by the student.
      key_view: view encoded by the momentum network, weakly augmented.
      student_temperature: > 0.
      target_temperature: > 0, lower than the student's.
      queue_size: number of past keys; a multiple of the global batch.
    """

    weight: float = 1.0
    query_view: int = 0
    key_view: int = 1
    student_temperature: float = 0.1
    target_temperature: float = 0.04
    queue_size: int = 131_072

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return {"student": (self.query_view,), "momentum": (self.key_view,)}

    def init(self, rng: Array, record: Record, inherited: Queue | None) -> Queue:
        dim = record.embedding("momentum", self.key_view).shape[-1]
        return Queue.create(rng, self.queue_size, dim)

    def __call__(self, record: Record, memory: Queue, step: Array) -> Term:
        query = l2_normalize(record.embedding("student", self.query_view))
        key = l2_normalize(record.embedding("momentum", self.key_view))
        losses = bank_cross_entropy(
            query,
            key,
            memory.vectors,
            memory.vectors,
            student_temperature=self.student_temperature,
            target_temperature=self.target_temperature,
        )
        metrics = {"query_std": embedding_std(query), "key_std": embedding_std(key)}
        return Term(jnp.mean(losses), memory.push(gather(key)), metrics)
