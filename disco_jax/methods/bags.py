"""BINGO: contrast with bags, groups of images with similar teacher features, as positives."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import Objective, Record, Term, Views, embedding_std, set_by_run
from disco_jax.methods.contrast import inherits
from disco_jax.ops.losses import contrast_accuracy, info_nce_beside
from disco_jax.ops.memory import Queue
from disco_jax.ops.mixing import cutmix, draw_box
from disco_jax.ops.queues import queue_logsumexp_of_each
from disco_jax.ops.vectors import l2_normalize

# Views 0 and 1 are of the image, 2 and 3 of another member of its bag; 4 is the CutMix of 0 and 2.
QUERY, KEY, MEMBER_QUERY, MEMBER_KEY, MIXED = range(5)


@dataclasses.dataclass(frozen=True)
class Bags(Objective):
    """InfoNCE with the teacher's keys of the image and of its bag. BINGO (arXiv:2107.01691).

    There are three student queries: the image, another member of its bag, and the CutMix of both.
    Each is contrasted with the teacher's key of the image and with that of the member, against past
    keys of images; the loss is the mean over the three queries. The queries of image and member
    weight their own key (intra-sample) and the other key (inter-sample) by 1/2 each. The mixed
    query weights the keys by the fraction of each image in it. The queue is used before this step's
    keys, of the images only, are pushed.

    Attributes:
      weight: factor of the term in the method's loss.
      temperature: tau > 0; BINGO's code uses 0.2, and 0.12 for EfficientNets.
      queue_size: number of past keys; a multiple of the global batch.
      queue_init: "random", or "teacher" to start from the queue in the teacher's checkpoint.
      cutmix: whether to add the mixed query; without it the mean is over two queries.
      own_epochs: epochs at the start in which the first two queries use only their own key.
      steps_per_epoch: unit of `own_epochs`; set by the run.
    """

    half_queues: ClassVar[bool] = True
    shard_queues: ClassVar[bool] = True
    bag_views: ClassVar[tuple[int, ...]] = (MEMBER_QUERY, MEMBER_KEY)

    weight: float = 1.0
    temperature: float = 0.2
    queue_size: int = 65_536
    queue_init: str = "random"
    cutmix: bool = True
    own_epochs: int = 11
    steps_per_epoch: int = set_by_run(0)

    @property
    def synthetic_views(self) -> tuple[int, ...]:
        return (MIXED,) if self.cutmix else ()

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return {
            "student": (QUERY, MEMBER_QUERY, *self.synthetic_views),
            "teacher": (KEY, MEMBER_KEY),
        }

    def match_width(self) -> str:
        return "embedding"

    def init(self, rng: Array, record: Record, inherited: Queue | None) -> Queue:
        dim = record.embedding("teacher", KEY).shape[-1]
        if self.queue_init == "teacher" and inherits(inherited, self.queue_size, dim):
            return inherited.rewound()
        return Queue.create(rng, self.queue_size, dim)

    def augment_batch(
        self, views: Mapping[int, Array], aux: Mapping[str, Array], rng: Array
    ) -> tuple[Mapping[int, Array], Mapping[str, Array]]:
        if not self.cutmix:
            return views, aux
        images, others = views[QUERY], views[MEMBER_QUERY]
        mixed, fraction = cutmix(images, others, *draw_box(rng, *images.shape[1:3]))
        return {**views, MIXED: mixed}, {**aux, "mix_ratio": fraction}

    def __call__(self, record: Record, memory: Queue, step: Array) -> Term:
        keys = [l2_normalize(record.embedding("teacher", view)) for view in (KEY, MEMBER_KEY)]
        own = jnp.where(step < self.own_epochs * self.steps_per_epoch, 1.0, 0.5)
        shares = {QUERY: own, MEMBER_QUERY: 1 - own}
        if self.cutmix:
            shares[MIXED] = record.aux["mix_ratio"]
        queries = {view: l2_normalize(record.embedding("student", view)) for view in shares}
        similarities = queue_logsumexp_of_each(
            queries,
            memory.vectors,
            temperature=self.temperature,
            reading=memory.access,
            shared=bool(memory.shared),
        )
        terms = []
        for view, share in shares.items():
            losses = [
                jnp.mean(
                    info_nce_beside(
                        queries[view], key, similarities[view].total, temperature=self.temperature
                    )
                )
                for key in keys
            ]
            terms.append(share * losses[0] + (1 - share) * losses[1])
        query, nearest = queries[QUERY], similarities[QUERY].nearest
        metrics = {
            "image": terms[0],
            "member": terms[1],
            "accuracy": jnp.mean(contrast_accuracy(query, keys[0], nearest)),
            "query_std": embedding_std(query),
            "key_std": embedding_std(keys[0]),
        }
        if self.cutmix:
            metrics["mixed"] = terms[2]
        return Term(jnp.mean(jnp.stack(terms)), memory.push_all(keys[0]), metrics)
