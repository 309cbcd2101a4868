"""InfoNCE against a queue of past keys: MoCo-v2, and the contrastive part of DisCo."""

import dataclasses
from typing import TypeGuard

import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import Objective, Record, Term, Views, alpha, spread
from disco_jax.ops.bank import USUAL, Reading, compared_together
from disco_jax.ops.losses import contrast_accuracy, info_nce_beside, rebalanced, unit
from disco_jax.ops.memory import Queue


@dataclasses.dataclass(frozen=True)
class Contrast(Objective):
    """The student's query must find its own key among a queue of past keys.

    MoCo (arXiv:1911.05722) eq. 1; two pairs make it symmetric (RETRO eq. 3). The logits use the
    queue as it is before this step's keys enter it.

    Attributes:
      weight: of the term in the method's loss.
      pairs: (query view, key view) of each contrast; their losses are averaged.
      keys_from: the network that encodes keys.
      temperature: tau > 0.
      queue_size: keys remembered a key view; a multiple of the global batch.
      queue_init: "teacher" starts from the queue that came with the teacher, if one did (the
        official DisCo code loads it with the teacher's file, disagreement D3); "random" never does.
      local_queries: every local view is a query too, for the key of the first pair, as in
        SSLight's MoCo-v2* (arXiv:2210.02808).
      global_share: of the pairs of global views in the loss, alpha in SSLight's eq. 3; -1: every
        query counts the same.
      reading: how queues are read, and `half`, whether they are kept in bfloat16: filled in from
        the config's `fast`.
      shared: rows that enter a queue in a step, where every replica keeps its own; 0: each keeps
        all. Filled in likewise.
    """

    weight: float = 1.0
    pairs: tuple[tuple[int, int], ...] = ((0, 1),)
    keys_from: str = "momentum"
    temperature: float = 0.2
    queue_size: int = 65_536
    queue_init: str = "teacher"
    local_queries: bool = False
    global_share: float = -1.0
    reading: Reading = USUAL
    half: bool = False
    shared: int = 0

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        queries, keys = zip(*self._all_pairs(views), strict=True)
        return {"student": queries, self.keys_from: keys}

    def matches(self) -> str | None:
        return "embedding" if self.keys_from == "teacher" else None

    def _all_pairs(self, views: Views) -> tuple[tuple[int, int], ...]:
        """The pairs of global views, then those that local views make."""
        extra = views.locals if self.local_queries else ()
        return (*self.pairs, *((query, self.pairs[0][1]) for query in extra))

    def init(self, rng: Array, record: Record, inherited: Queue | None) -> dict[str, Queue]:
        dim = record.embedding("student", self.pairs[0][0]).shape[-1]
        if self.queue_init == "teacher" and inherits(inherited, self.queue_size, dim):
            begin = inherited.rewound().stored(self.half, self.shared)
            return {_bank(key): begin for _, key in self.pairs}
        fresh = {
            _bank(key): Queue.create(jax.random.fold_in(rng, key), self.queue_size, dim)
            for _, key in self.pairs
        }
        return {name: queue.stored(self.half, self.shared) for name, queue in fresh.items()}

    def __call__(self, record: Record, memory: dict[str, Queue], step: Array) -> Term:
        losses, accuracies, queues = {}, {}, {}
        pairs = self._all_pairs(record.views)
        for key_view in dict.fromkeys(key for _, key in pairs):
            key, queue = unit(record.embedding(self.keys_from, key_view)), memory[_bank(key_view)]
            queries = {v: unit(record.embedding("student", v)) for v, k in pairs if k == key_view}
            banks = compared_together(
                queries,
                queue.vectors,
                temperature=self.temperature,
                reading=self.reading,
                shared=bool(queue.shared),
            )
            for view, query in queries.items():
                near = info_nce_beside(query, key, banks[view].total, temperature=self.temperature)
                losses[view, key_view] = jnp.mean(near)
                found = contrast_accuracy(query, key, banks[view].nearest)
                accuracies[view, key_view] = jnp.mean(found)
            queues[_bank(key_view)] = queue.push_all(key)
        metrics = {
            "accuracy": jnp.mean(jnp.stack([accuracies[pair] for pair in pairs])),
            "query_std": spread(query),
            "key_std": spread(key),
        }
        each, between = [losses[pair] for pair in pairs], len(self.pairs)
        loss = rebalanced(each[:between], each[between:], alpha(self.global_share))
        return Term(loss, queues, metrics)


def _bank(key_view: int) -> str:
    return f"view_{key_view}"


def inherits(inherited: Queue | None, size: int, dim: int) -> TypeGuard[Queue]:
    """Whether a teacher's queue is there and has the shape that is asked for."""
    return inherited is not None and inherited.vectors.shape == (size, dim)
