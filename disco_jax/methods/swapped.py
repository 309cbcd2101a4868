"""SwAV: a view's scores on prototypes predict another view's balanced assignment."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import (
    Objective,
    Record,
    Term,
    Views,
    embedding_std,
    prototype_perplexity,
    set_by_run,
)
from disco_jax.methods.multicrop import pair_loss
from disco_jax.ops.collectives import gather, local_slice
from disco_jax.ops.memory import Queue
from disco_jax.ops.sinkhorn import sinkhorn
from disco_jax.ops.vectors import l2_normalize


@dataclasses.dataclass(frozen=True)
class Swapped(Objective):
    """Swapped prediction of balanced assignments. SwAV (arXiv:2006.09882) eq. 1 to 5.

    Sinkhorn's algorithm computes the assignments on the global batch and, optionally, a queue of
    past embeddings. The queue is scored on the prototypes of this step, before this step's
    embeddings are pushed.

    Attributes:
      weight: factor of the term in the method's loss.
      assign: global views whose assignments the other views predict.
      temperature: tau > 0 of the prediction.
      epsilon: entropy weight of Sinkhorn's algorithm, > 0.
      iterations: rounds of Sinkhorn's algorithm, at least 1.
      queue_size: number of past embeddings per view of `assign`, a multiple of the global batch; 0:
        no queue.
      queue_epochs: epochs before the queue starts to fill; it is used once it is full.
      global_share: weight of the pairs of two global views in the loss, alpha in SSLight's eq. 3
        (arXiv:2210.02808); -1: all pairs weigh equally.
      steps_per_epoch: unit of `queue_epochs`; set by the run.
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
    steps_per_epoch: int = set_by_run(1)

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return {"student": tuple({*self.assign, *views.globals, *views.locals})}

    def check_queue(self, setting: str, size: int, batch_size: int) -> None:
        if size:  # the queue is optional
            super().check_queue(setting, size, batch_size)

    def init(self, rng: Array, record: Record, inherited: Queue | None) -> dict[str, Queue]:
        if not self.queue_size:
            return {}
        dim = record.embedding("student", self.assign[0]).shape[-1]
        return {_queue_name(view): Queue.empty(self.queue_size, dim) for view in self.assign}

    def __call__(self, record: Record, memory: dict[str, Queue], step: Array) -> Term:
        targets = {view: self._assignments(record, memory, view) for view in self.assign}
        loss = pair_loss(record, targets, self.temperature, self.global_share)
        first = self.assign[0]
        metrics = {
            "confidence": jnp.mean(jnp.max(targets[first], axis=-1)),
            "usage": prototype_perplexity(record.scores("student", first), self.temperature),
            "student_std": embedding_std(l2_normalize(record.embedding("student", first))),
        }
        if memory:
            metrics["queue_full"] = memory[_queue_name(first)].full.astype(jnp.float32)
        return Term(loss, self._remember(record, memory, step), metrics)

    def _assignments(self, record: Record, memory: dict[str, Queue], view: int) -> Array:
        """Returns the targets of one view, f32[B, K], from this step's embeddings and the queue."""
        scores = record.scores("student", view)
        options: dict[str, Any] = dict(epsilon=self.epsilon, iterations=self.iterations)
        if not self.queue_size:
            return sinkhorn(scores, **options)
        queue = memory[_queue_name(view)]
        # Each replica scores its slice of the queue.
        queue_scores = record.score["student"](local_slice(queue.vectors))
        is_full = jnp.broadcast_to(queue.full.astype(jnp.float32), queue_scores.shape[:1])
        mask = jnp.concatenate([is_full, jnp.ones(scores.shape[:1], jnp.float32)])
        plan = sinkhorn(jnp.concatenate([queue_scores, scores]), mask=mask, **options)
        return plan[queue_scores.shape[0] :]

    def _remember(self, record: Record, memory: dict[str, Queue], step: Array) -> dict[str, Queue]:
        """Pushes this step's embeddings to the queues after `queue_epochs` epochs."""
        started = step >= self.queue_epochs * self.steps_per_epoch
        pushed = {}
        for view in self.assign if self.queue_size else ():
            old = memory[_queue_name(view)]
            rows = jax.lax.stop_gradient(l2_normalize(record.embedding("student", view)))
            new = old.push(gather(rows))
            pushed[_queue_name(view)] = jax.tree.map(
                lambda a, b: jnp.where(started, a, b), new, old
            )
        return pushed


def _queue_name(view: int) -> str:
    return f"view_{view}"
