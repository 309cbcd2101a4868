"""Classification of the teacher's clusters: precomputed K-means labels, or online centroids."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from disco_jax import errors
from disco_jax.methods.base import Objective, Record, Term, Views, embedding_std
from disco_jax.ops.collectives import gather
from disco_jax.ops.losses import class_cross_entropy
from disco_jax.ops.memory import Queue
from disco_jax.ops.vectors import l2_normalize


@dataclasses.dataclass(frozen=True)
class PseudoLabels(Objective):
    """Cross-entropy with the K-means cluster of an image. SEED (arXiv:2101.04731), appendix.

    `disco-jax bags` computes the clusters from the teacher's features. The student's prototypes
    are the classifier, and the step runs no teacher.

    Attributes:
      weight: factor of the term in the method's loss.
      view: view encoded by the student.
    """

    aux: ClassVar[tuple[str, ...]] = ("cluster",)

    weight: float = 1.0
    view: int = 0

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return {"student": (self.view,)}

    def check(self, setting: str, record: Record) -> None:
        if record.encoded["student"][self.view].scores is None:
            raise errors.UserError(
                f"{setting} classifies with the student's prototypes, but there are none. Set "
                "config.student.prototypes to the number of clusters, e.g. (4096,), and "
                "config.student.head=none to apply them to the features."
            )

    def __call__(self, record: Record, memory: tuple[()], step: Array) -> Term:
        scores, labels = record.scores("student", self.view), record.aux["cluster"]
        correct = jnp.argmax(scores, axis=-1) == labels
        metrics = {
            "accuracy": jnp.mean(correct.astype(jnp.float32)),
            "student_std": embedding_std(l2_normalize(record.embedding("student", self.view))),
        }
        return Term(jnp.mean(class_cross_entropy(scores, labels)), memory, metrics)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Centroids:
    """Memory of `OnlineClusters`.

    Attributes:
      vectors: f32[K, D], unit rows.
      usage: f32[K], running fraction of the images assigned to each centroid.
    """

    vectors: Array
    usage: Array


@dataclasses.dataclass(frozen=True)
class OnlineClusters(Objective):
    """Cross-entropy with the nearest of running centroids of the teacher's embeddings.

    SEED (arXiv:2101.04731), appendix, does not specify the details. Here each teacher embedding is
    assigned to the centroid of highest cosine, and the student's logits are its cosines divided by
    the temperature. Each centroid then moves towards the mean of its assigned embeddings in the
    global batch, as an EMA. Unused centroids are replaced by embeddings of the batch.

    Attributes:
      weight: factor of the term in the method's loss.
      view: view encoded by student and teacher.
      count: number of centroids.
      temperature: > 0, of the student's logits.
      rate: EMA rate of the centroids and of their running usage.
      idle: centroids with usage below `idle` / `count` are replaced.
    """

    weight: float = 1.0
    view: int = 0
    count: int = 4096
    temperature: float = 0.2
    rate: float = 0.9
    idle: float = 0.01

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return {"student": (self.view,), "teacher": (self.view,)}

    def match_width(self) -> str:
        return "embedding"

    def init(self, rng: Array, record: Record, inherited: Queue | None) -> Centroids:
        dim = record.embedding("teacher", self.view).shape[-1]
        vectors = l2_normalize(jax.random.normal(rng, (self.count, dim)))
        return Centroids(vectors, jnp.zeros(self.count))

    def __call__(self, record: Record, memory: Centroids, step: Array) -> Term:
        student = l2_normalize(record.embedding("student", self.view))
        teacher = l2_normalize(record.embedding("teacher", self.view))
        assigned = jnp.argmax(teacher @ memory.vectors.T, axis=-1)
        logits = jnp.matmul(student, memory.vectors.T, precision=jax.lax.Precision.HIGHEST)
        loss = jnp.mean(class_cross_entropy(logits / self.temperature, assigned))
        updated = self.follow(memory, gather(teacher), gather(assigned))
        correct = (jnp.argmax(logits, axis=-1) == assigned).astype(jnp.float32)
        metrics = {
            "accuracy": jnp.mean(correct),
            "used": jnp.mean((updated.usage > self.idle / self.count).astype(jnp.float32)),
            "student_std": embedding_std(student),
        }
        return Term(loss, updated, metrics)

    def follow(self, memory: Centroids, rows: Array, assigned: Array) -> Centroids:
        """Returns the centroids updated by a global batch.

        Args:
          memory: the centroids before the update.
          rows: f32[B, D], unit embeddings of the global batch.
          assigned: i32[B], the centroid of each row.
        """
        counts = jnp.zeros(self.count).at[assigned].add(1.0)
        sums = jnp.zeros_like(memory.vectors).at[assigned].add(rows)
        moved = l2_normalize(self.rate * memory.vectors + (1 - self.rate) * l2_normalize(sums))
        vectors = jnp.where((counts > 0)[:, None], moved, memory.vectors)
        usage = self.rate * memory.usage + (1 - self.rate) * counts / len(rows)
        # The least used centroids, at most one per row of the batch, are candidates to be replaced.
        least = jnp.argsort(usage)[: len(rows)]
        idle = usage[least] < self.idle / self.count
        replaced = jnp.where(idle[:, None], rows[: len(least)], vectors[least])
        return Centroids(vectors.at[least].set(replaced), usage)
