"""SEED: the student's similarities to a queue of teacher embeddings copy the teacher's."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import Objective, Record, Term, Views, spread
from disco_jax.methods.contrast import inherits
from disco_jax.ops.bank import USUAL, Reading
from disco_jax.ops.losses import soft_cross_entropy, unit
from disco_jax.ops.memory import Queue

Pairs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Similarity(Objective):
    """Soft cross-entropy over a queue that the teacher fills. SEED (arXiv:2101.04731) eq. 5.

    The similarities use the queue as it is before this step's teacher embeddings enter it.

    Attributes:
      weight: of the term in the method's loss.
      groups: of (student view, teacher view) pairs. A group's loss is the mean over its pairs, its
        queue that of the first pair's teacher view, which is also what enters the queue; the
        groups' losses are added. SEED's four ways (fig. 6 of its appendix), view 0 large, 1 to 6
        small:
          identical   (((0, 0),),)
          cross       (((0, 1),),), two large views
          to large    (((0, 0),), ((1, 0), ..., (6, 0))): the target is the large view's, always
          small patch (((0, 0),), ((1, 1), ..., (6, 6))): two queues
      student_temperature: tau_S > 0.
      teacher_temperature: tau_T >= 0; 0.01 is the paper's, 1e-4 the code's (disagreement S1); at
        0 the target is one-hot and the loss InfoNCE.
      queue_size: teacher embeddings remembered a queue; a multiple of the global batch.
      queue_init: "random" as SEED starts, "teacher" to start from the teacher's own queue.
      reading: how queues are read; filled in from the config's `fast`.
      shared: rows that enter a queue in a step, where every replica keeps its own; 0: each keeps
        all. Filled in likewise.
    """

    weight: float = 1.0
    groups: tuple[Pairs, ...] = (((0, 0),),)
    student_temperature: float = 0.2
    teacher_temperature: float = 0.01
    queue_size: int = 65_536
    queue_init: str = "random"
    reading: Reading = USUAL
    shared: int = 0

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        students, teachers = zip(*(pair for group in self.groups for pair in group), strict=True)
        return {"student": students, "teacher": teachers}

    def matches(self) -> str:
        return "embedding"

    def init(self, rng: Array, record: Record, inherited: Queue | None) -> dict[str, Queue]:
        banks = {}
        for group in self.groups:
            view = group[0][1]
            dim = record.embedding("teacher", view).shape[-1]
            if self.queue_init == "teacher" and inherits(inherited, self.queue_size, dim):
                begin = inherited.rewound()
            else:
                begin = Queue.create(jax.random.fold_in(rng, view), self.queue_size, dim)
            banks[_bank(group)] = begin.stored(False, self.shared)
        return banks

    def __call__(self, record: Record, memory: dict[str, Queue], step: Array) -> Term:
        losses, banks = [], {}
        for group in self.groups:
            bank = memory[_bank(group)]
            losses.append(self._group(record, bank, group))
            banks[_bank(group)] = bank.push_all(unit(record.embedding("teacher", group[0][1])))
        view, theirs = self.groups[0][0]
        student, teacher = record.embedding("student", view), record.embedding("teacher", theirs)
        metrics = {
            "cosine": jnp.mean(jnp.sum(unit(student) * unit(teacher), axis=-1)),
            "student_std": spread(unit(student)),
            "teacher_std": spread(unit(teacher)),
        }
        return Term(jnp.sum(jnp.stack(losses)), banks, metrics)

    def _group(self, record: Record, bank: Queue, group: Pairs) -> Array:
        """The mean over the pairs, whose rows go through the bank together."""
        students = [unit(record.embedding("student", view)) for view, _ in group]
        teachers = [unit(record.embedding("teacher", view)) for _, view in group]
        each = soft_cross_entropy(
            jnp.concatenate(students),
            jnp.concatenate(teachers),
            bank.vectors,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            reading=self.reading,
            shared=bool(bank.shared),
        )
        return jnp.mean(each)


def _bank(group: Pairs) -> str:
    return f"view_{group[0][1]}"
