"""SEED: matches the student's similarities to a queue of teacher embeddings with the teacher's."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import Objective, Record, Term, Views, embedding_std
from disco_jax.methods.contrast import inherits
from disco_jax.ops.losses import soft_cross_entropy
from disco_jax.ops.memory import Queue
from disco_jax.ops.vectors import l2_normalize

Pairs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Similarity(Objective):
    """Soft cross-entropy over a queue of teacher embeddings. SEED (arXiv:2101.04731) eq. 5.

    The similarities use the queue before this step's teacher embeddings are pushed. The `groups` of
    SEED's four strategies (fig. 6 of its appendix), where view 0 is large and views 1 to 6 are
    small:
      identical   (((0, 0),),)
      cross       (((0, 1),),), two large views
      to large    (((0, 0),), ((1, 0), ..., (6, 0))): the target is always the large view
      small patch (((0, 0),), ((1, 1), ..., (6, 6))): two queues

    Attributes:
      weight: factor of the term in the method's loss.
      groups: groups of (student view, teacher view) pairs. A group's loss is the mean over its
        pairs; the losses of groups are summed. A group uses, and pushes to, the queue of its first
        pair's teacher view.
      student_temperature: tau_S > 0.
      teacher_temperature: tau_T >= 0; 0.01 in the paper, 1e-4 in the code (disagreement S1); at 0
        the target is one-hot and the loss equals InfoNCE.
      queue_size: number of past teacher embeddings per queue; a multiple of the global batch.
      queue_init: "random" as in SEED, or "teacher" to start from the queue in the teacher's
        checkpoint.
    """

    shard_queues: ClassVar[bool] = True
    # At teacher_temperature 0 the target is one-hot.
    positive: ClassVar[tuple[str, ...]] = ("student_temperature",)

    weight: float = 1.0
    groups: tuple[Pairs, ...] = (((0, 0),),)
    student_temperature: float = 0.2
    teacher_temperature: float = 0.01
    queue_size: int = 65_536
    queue_init: str = "random"

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        students, teachers = zip(*(pair for group in self.groups for pair in group), strict=True)
        return {"student": students, "teacher": teachers}

    def match_width(self) -> str:
        return "embedding"

    def init(self, rng: Array, record: Record, inherited: Queue | None) -> dict[str, Queue]:
        queues = {}
        for group in self.groups:
            view = group[0][1]
            dim = record.embedding("teacher", view).shape[-1]
            if self.queue_init == "teacher" and inherits(inherited, self.queue_size, dim):
                initial = inherited.rewound()
            else:
                initial = Queue.create(jax.random.fold_in(rng, view), self.queue_size, dim)
            queues[_queue_name(group)] = initial
        return queues

    def __call__(self, record: Record, memory: dict[str, Queue], step: Array) -> Term:
        losses, queues = [], {}
        for group in self.groups:
            queue = memory[_queue_name(group)]
            losses.append(self._group_loss(record, queue, group))
            keys = l2_normalize(record.embedding("teacher", group[0][1]))
            queues[_queue_name(group)] = queue.push_all(keys)
        view, teacher_view = self.groups[0][0]
        student = record.embedding("student", view)
        teacher = record.embedding("teacher", teacher_view)
        metrics = {
            "cosine": jnp.mean(jnp.sum(l2_normalize(student) * l2_normalize(teacher), axis=-1)),
            "student_std": embedding_std(l2_normalize(student)),
            "teacher_std": embedding_std(l2_normalize(teacher)),
        }
        return Term(jnp.sum(jnp.stack(losses)), queues, metrics)

    def _group_loss(self, record: Record, queue: Queue, group: Pairs) -> Array:
        """Returns the mean loss over the pairs, computed in one pass over the queue."""
        students = [l2_normalize(record.embedding("student", view)) for view, _ in group]
        teachers = [l2_normalize(record.embedding("teacher", view)) for _, view in group]
        losses = soft_cross_entropy(
            jnp.concatenate(students),
            jnp.concatenate(teachers),
            queue.vectors,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            reading=queue.access,
            shared=bool(queue.shared),
        )
        return jnp.mean(losses)


def _queue_name(group: Pairs) -> str:
    return f"view_{group[0][1]}"
