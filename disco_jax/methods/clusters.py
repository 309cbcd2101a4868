"""Learning the teacher's clusters: K-means pseudo labels made beforehand, or online."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from disco_jax import errors
from disco_jax.methods.base import Objective, Record, Term, Views, spread
from disco_jax.ops.collectives import gather
from disco_jax.ops.losses import class_cross_entropy, unit
from disco_jax.ops.memory import Queue


@dataclasses.dataclass(frozen=True)
class PseudoLabels(Objective):
    """Cross-entropy with the K-means cluster of an image. SEED (arXiv:2101.04731), appendix.

    `disco-jax bags` makes the clusters from the teacher's features; the student's prototypes
    are the classifier, and no teacher runs in the step.

    Attributes:
      weight: of the term in the method's loss.
      view: that the student encodes.
    """

    aux: ClassVar[tuple[str, ...]] = ("cluster",)

    weight: float = 1.0
    view: int = 0

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return {"student": (self.view,)}

    def check(self, setting: str, record: Record) -> None:
        if record.encoded["student"][self.view].scores is None:
            raise errors.UserError(
                f"{setting} classifies with the student's prototypes, and there are none. Set "
                "config.student.prototypes to the number of clusters, e.g. (4096,), and "
                "config.student.head=none to put them on the features."
            )

    def __call__(self, record: Record, memory: tuple[()], step: Array) -> Term:
        scores, labels = record.scores("student", self.view), record.aux["cluster"]
        right = jnp.argmax(scores, axis=-1) == labels
        metrics = {
            "accuracy": jnp.mean(right.astype(jnp.float32)),
            "student_std": spread(unit(record.embedding("student", self.view))),
        }
        return Term(jnp.mean(class_cross_entropy(scores, labels)), memory, metrics)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Centroids:
    """What online clustering remembers.

    Attributes:
      vectors: f32[K, D], unit rows.
      usage: f32[K], running share of the images that each has won.
    """

    vectors: Array
    usage: Array


@dataclasses.dataclass(frozen=True)
class OnlineClusters(Objective):
    """Cross-entropy with the nearest of running centroids of the teacher's embeddings.

    SEED (arXiv:2101.04731), appendix, leaves the details open. Here: each of the teacher's
    embeddings belongs to the centroid of the highest cosine; the student's cosines over the
    temperature are its logits; afterwards a centroid moves to the mean of what it won in the
    global batch, as an EMA, and centroids that win nothing are set to embeddings of the batch.

    Attributes:
      weight: of the term in the method's loss.
      view: that student and teacher encode.
      count: centroids.
      temperature: > 0, of the student's logits.
      rate: share of a centroid that is kept where it won, and of the running usage.
      idle: a centroid whose usage is below this share of an even one is replaced.
    """

    weight: float = 1.0
    view: int = 0
    count: int = 4096
    temperature: float = 0.2
    rate: float = 0.9
    idle: float = 0.01

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return {"student": (self.view,), "teacher": (self.view,)}

    def matches(self) -> str:
        return "embedding"

    def init(self, rng: Array, record: Record, inherited: Queue | None) -> Centroids:
        dim = record.embedding("teacher", self.view).shape[-1]
        vectors = unit(jax.random.normal(rng, (self.count, dim)))
        return Centroids(vectors, jnp.zeros(self.count))

    def __call__(self, record: Record, memory: Centroids, step: Array) -> Term:
        student = unit(record.embedding("student", self.view))
        teacher = unit(record.embedding("teacher", self.view))
        won = jnp.argmax(teacher @ memory.vectors.T, axis=-1)
        logits = jnp.matmul(student, memory.vectors.T, precision=jax.lax.Precision.HIGHEST)
        loss = jnp.mean(class_cross_entropy(logits / self.temperature, won))
        after = self.follow(memory, gather(teacher), gather(won))
        right = (jnp.argmax(logits, axis=-1) == won).astype(jnp.float32)
        metrics = {
            "accuracy": jnp.mean(right),
            "used": jnp.mean((after.usage > self.idle / self.count).astype(jnp.float32)),
            "student_std": spread(student),
        }
        return Term(loss, after, metrics)

    def follow(self, memory: Centroids, rows: Array, won: Array) -> Centroids:
        """The centroids after the embeddings f32[B, D] of a global batch, won by i32[B]."""
        counts = jnp.zeros(self.count).at[won].add(1.0)
        sums = jnp.zeros_like(memory.vectors).at[won].add(rows)
        moved = unit(self.rate * memory.vectors + (1 - self.rate) * unit(sums))
        vectors = jnp.where((counts > 0)[:, None], moved, memory.vectors)
        usage = self.rate * memory.usage + (1 - self.rate) * counts / len(rows)
        # The least used make room for embeddings of this batch, as many as there are of these.
        least = jnp.argsort(usage)[: len(rows)]
        idle = usage[least] < self.idle / self.count
        fresh = jnp.where(idle[:, None], rows[: len(least)], vectors[least])
        return Centroids(vectors.at[least].set(fresh), usage)
