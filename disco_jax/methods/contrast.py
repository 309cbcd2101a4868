"""InfoNCE against a queue of past keys: MoCo-v2 and the contrastive term of DisCo."""

import dataclasses
from typing import ClassVar, TypeGuard

import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import Objective, Record, Term, Views, alpha, embedding_std
from disco_jax.ops.losses import contrast_accuracy, info_nce_beside, rebalanced
from disco_jax.ops.memory import Queue
from disco_jax.ops.queues import queue_logsumexp_of_each
from disco_jax.ops.vectors import l2_normalize


@dataclasses.dataclass(frozen=True)
class Contrast(Objective):
    """InfoNCE of the student's query, its key and a queue of past keys as negatives.

    MoCo (arXiv:1911.05722) eq. 1. Two pairs make it symmetric (RETRO eq. 3). The logits use the
    queue before this step's keys are pushed.

    Attributes:
      weight: factor of the term in the method's loss.
      pairs: (query view, key view) of each contrast; the losses are averaged.
      keys_from: the network that encodes keys.
      temperature: tau > 0.
      queue_size: number of past keys per key view; a multiple of the global batch.
      queue_init: "teacher": start from the queue in the teacher's checkpoint if it has one, as the
        official DisCo code does (disagreement D3); "random": always start from random rows.
      local_queries: use every local view as a further query for the key of the first pair, as in
        SSLight's MoCo-v2* (arXiv:2210.02808).
      global_share: weight of the pairs of global views, alpha in SSLight's eq. 3; -1: all queries
        weigh equally.
    """

    half_queues: ClassVar[bool] = True
    shard_queues: ClassVar[bool] = True

    weight: float = 1.0
    pairs: tuple[tuple[int, int], ...] = ((0, 1),)
    keys_from: str = "momentum"
    temperature: float = 0.2
    queue_size: int = 65_536
    queue_init: str = "teacher"
    local_queries: bool = False
    global_share: float = -1.0

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        queries, keys = zip(*self._all_pairs(views), strict=True)
        return {"student": queries, self.keys_from: keys}

    def match_width(self) -> str | None:
        return "embedding" if self.keys_from == "teacher" else None

    def _all_pairs(self, views: Views) -> tuple[tuple[int, int], ...]:
        """Returns `pairs`, followed by those of local queries."""
        extra = views.locals if self.local_queries else ()
        return (*self.pairs, *((query, self.pairs[0][1]) for query in extra))

    def init(self, rng: Array, record: Record, inherited: Queue | None) -> dict[str, Queue]:
        dim = record.embedding("student", self.pairs[0][0]).shape[-1]
        if self.queue_init == "teacher" and inherits(inherited, self.queue_size, dim):
            return {_queue_name(key): inherited.rewound() for _, key in self.pairs}
        return {
            _queue_name(key): Queue.create(jax.random.fold_in(rng, key), self.queue_size, dim)
            for _, key in self.pairs
        }

    def __call__(self, record: Record, memory: dict[str, Queue], step: Array) -> Term:
        losses, accuracies, queues = {}, {}, {}
        pairs = self._all_pairs(record.views)
        for key_view in dict.fromkeys(key for _, key in pairs):
            key = l2_normalize(record.embedding(self.keys_from, key_view))
            queue = memory[_queue_name(key_view)]
            queries = {
                v: l2_normalize(record.embedding("student", v)) for v, k in pairs if k == key_view
            }
            similarities = queue_logsumexp_of_each(
                queries,
                queue.vectors,
                temperature=self.temperature,
                reading=queue.access,
                shared=bool(queue.shared),
            )
            for view, query in queries.items():
                loss = info_nce_beside(
                    query, key, similarities[view].total, temperature=self.temperature
                )
                losses[view, key_view] = jnp.mean(loss)
                accuracy = contrast_accuracy(query, key, similarities[view].nearest)
                accuracies[view, key_view] = jnp.mean(accuracy)
            queues[_queue_name(key_view)] = queue.push_all(key)
        metrics = {
            "accuracy": jnp.mean(jnp.stack([accuracies[pair] for pair in pairs])),
            "query_std": embedding_std(query),
            "key_std": embedding_std(key),
        }
        by_pair, count = [losses[pair] for pair in pairs], len(self.pairs)
        loss = rebalanced(by_pair[:count], by_pair[count:], alpha(self.global_share))
        return Term(loss, queues, metrics)


def _queue_name(key_view: int) -> str:
    return f"view_{key_view}"


def inherits(inherited: Queue | None, size: int, dim: int) -> TypeGuard[Queue]:
    """Returns whether the teacher's checkpoint has a queue of shape [size, dim]."""
    return inherited is not None and inherited.vectors.shape == (size, dim)
