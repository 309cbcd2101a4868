"""SwAV: a view's scores on prototypes predict another view's balanced assignment to them."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import Objective, Record, Term, Views, spread, usage
from disco_jax.methods.multicrop import pair_loss
from disco_jax.ops.collectives import gather, share
from disco_jax.ops.losses import unit
from disco_jax.ops.memory import Queue
from disco_jax.ops.sinkhorn import sinkhorn


@dataclasses.dataclass(frozen=True)
class Swapped(Objective):
    """Swapped prediction of balanced assignments. SwAV (arXiv:2006.09882) eq. 1 to 5.

    Assignments are made by Sinkhorn's algorithm on the global batch, beside a queue of past
    embeddings where there is one. The queue is scored on the prototypes of this step and is read
    as it is before this step's embeddings enter it.

    Attributes:
      weight: of the term in the method's loss.
      assign: views whose assignments the others predict; global ones.
      temperature: tau > 0 of the prediction.
      epsilon: of Sinkhorn's algorithm, > 0.
      iterations: of Sinkhorn's algorithm, 1 or more.
      queue_size: embeddings remembered a view of `assign`, a multiple of the global batch; 0: none.
      queue_epochs: epochs before the queue starts to fill; it is read once it is full.
      global_share: of the pairs of two global views in the loss, alpha in SSLight's eq. 3
        (arXiv:2210.02808); -1: every pair counts the same.
      steps_per_epoch: what `queue_epochs` counts in.
    """

    reads_scores: ClassVar[bool] = True

    weight: float = 1.0
    assign: tuple[int, ...] = (0, 1)
    temperature: float = 0.1
    epsilon: float = 0.05
    iterations: int = 3
    queue_size: int = 0
    queue_epochs: int = 0
    global_share: float = -1.0
    steps_per_epoch: int = 1

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return {"student": tuple({*self.assign, *views.globals, *views.locals})}

    def init(self, rng: Array, record: Record, inherited: Queue | None) -> dict[str, Queue]:
        if not self.queue_size:
            return {}
        dim = record.embedding("student", self.assign[0]).shape[-1]
        return {_bank(view): Queue.empty(self.queue_size, dim) for view in self.assign}

    def __call__(self, record: Record, memory: dict[str, Queue], step: Array) -> Term:
        targets = {view: self._assignments(record, memory, view) for view in self.assign}
        loss = pair_loss(record, targets, self.temperature, self.global_share)
        first = self.assign[0]
        metrics = {
            "confidence": jnp.mean(jnp.max(targets[first], axis=-1)),
            "usage": usage(record.scores("student", first), self.temperature),
            "student_std": spread(unit(record.embedding("student", first))),
        }
        if memory:
            metrics["queue_full"] = memory[_bank(first)].full.astype(jnp.float32)
        return Term(loss, self._remember(record, memory, step), metrics)

    def _assignments(self, record: Record, memory: dict[str, Queue], view: int) -> Array:
        """f32[B, K]: targets of one view, from this step's embeddings and the queue's."""
        scores = record.scores("student", view)
        options: dict[str, Any] = dict(epsilon=self.epsilon, iterations=self.iterations)
        if not self.queue_size:
            return sinkhorn(scores, **options)
        queue = memory[_bank(view)]
        kept = record.score["student"](share(queue.vectors))  # each replica scores its part
        there = jnp.broadcast_to(queue.full.astype(jnp.float32), kept.shape[:1])
        mask = jnp.concatenate([there, jnp.ones(scores.shape[:1], jnp.float32)])
        plan = sinkhorn(jnp.concatenate([kept, scores]), mask=mask, **options)
        return plan[kept.shape[0] :]

    def _remember(self, record: Record, memory: dict[str, Queue], step: Array) -> dict[str, Queue]:
        """The queues with this step's embeddings, once the run is old enough."""
        started = step >= self.queue_epochs * self.steps_per_epoch
        pushed = {}
        for view in self.assign if self.queue_size else ():
            old = memory[_bank(view)]
            rows = jax.lax.stop_gradient(unit(record.embedding("student", view)))
            new = old.push(gather(rows))
            pushed[_bank(view)] = jax.tree.map(lambda a, b: jnp.where(started, a, b), new, old)
        return pushed


def _bank(view: int) -> str:
    return f"view_{view}"
