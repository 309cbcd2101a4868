"""Label-free health signals of a run: spread of the embedding, agreement, and collapse."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from disco_jax import errors
from disco_jax.methods.base import Record, embedding_std
from disco_jax.ops.collectives import gather, pmean, replicas
from disco_jax.ops.losses import squared_distance
from disco_jax.ops.memory import Queue
from disco_jax.ops.queues import nearest
from disco_jax.ops.vectors import l2_normalize

if TYPE_CHECKING:
    from disco_jax.train.run_settings import HealthSettings

_LOG = logging.getLogger(__name__)

PREFIX = "health/"
STD = PREFIX + "std"  # present whenever signals are measured
# Rows of the global batch used for rank and uniformity: enough for embeddings of width 128, while
# the cost of the matrix is negligible beside that of a network.
ROWS = 256
# The t of the uniformity loss. Uniformity is about -4 for rows drawn uniformly from a sphere in
# many dimensions, and 0 for equal rows.
_SHARPNESS = 2.0


def measured(
    record: Record, memory: Mapping[str, Any], step: Array, every: int
) -> dict[str, Array]:
    """Computes `signals` at every `every`-th step, averaged over replicas.

    Args:
      record, memory: see `signals`.
      step: i32[], equal on all replicas; signals are measured if step + 1 is a multiple of `every`.
      every: at least 1; usually the number of steps between two log lines.

    Returns:
      name -> array, equal on all replicas; NaN at all other steps.
    """

    def measure() -> dict[str, Array]:
        return pmean(signals(record, memory, step))

    def skip() -> dict[str, Array]:
        return jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(measure))

    return jax.lax.cond((step + 1) % every == 0, measure, skip)


def signals(record: Record, memory: Mapping[str, Any], step: Array) -> dict[str, Array]:
    """Computes the health signals of the student's first view and of the queues.

    A signal is omitted if the method lacks the data for it.

    Args:
      record: the encodings of this replica.
      memory: the method's memory before this step.
      step: i32[].

    Returns:
      name -> f32[], to be averaged over replicas:
        "health/std": `embedding_std` of the embedding, 1 if isotropic, 0 if collapsed.
        "health/uniformity" (arXiv:2005.10242): log of the mean Gaussian potential of two images.
        "health/alignment" (arXiv:2005.10242): mean squared distance between two encodings of an
        image. The second encoding comes from the student, or else from the momentum network, or
        else from the teacher.
        "health/agreement": share of images for which student and teacher have the same nearest
        row of a queue.
        "health/queue_age": number of steps since the oldest row of the longest queue was pushed.
      And "health/rank", f32[N, N]: a Gram matrix of the features, the input of `effective_rank`.
    """
    view = next(iter(record.encoded["student"]))
    embedding = l2_normalize(record.embedding("student", view))
    features = record.output("student", view, "features")
    values = {"std": embedding_std(embedding), "rank": _gram(features)}
    if len(embedding) * replicas() > 1:
        values["uniformity"] = _uniformity(_global_rows(embedding))
    other = _second_encoding(record, view, embedding.shape[-1])
    if other is not None:
        values["alignment"] = jnp.mean(squared_distance(embedding, other))
    queues = [q for q in jax.tree.leaves(memory, is_leaf=_is_queue) if _is_queue(q)]
    if queues:
        pushes = max(queue.size for queue in queues) / (len(embedding) * replicas())
        values["queue_age"] = jnp.minimum(step.astype(jnp.float32), jnp.float32(pushes))
    agreement = _agreement(record, queues)
    if agreement is not None:
        values["agreement"] = agreement
    return {PREFIX + name: value for name, value in values.items()}


def effective_rank(gram: np.ndarray) -> float:
    """Computes RankMe (arXiv:2210.02885, eq. 1).

    This is the exponential of the entropy of the normalised singular values.

    Args:
      gram: f32[N, N], Z Z^T or Z^T Z of the features Z. Its eigenvalues are the squared singular
        values of Z.

    Returns:
      A value between 1 (all features on one line) and N.
    """
    squares = np.linalg.eigvalsh(np.asarray(gram, np.float64))
    singular_values = np.sqrt(np.maximum(squares, 0.0))
    shares = singular_values / max(singular_values.sum(), 1e-12) + 1e-12
    return float(np.exp(-np.sum(shares * np.log(shares))))


@dataclasses.dataclass
class Watch:
    """Detects a collapsed embedding in the summaries of a run.

    Attributes:
      settings: when an embedding counts as collapsed, and what follows.
    """

    settings: "HealthSettings"
    _low: int = 0

    def __call__(self, step: int, summary: Mapping[str, float]) -> None:
        """Checks a summary; logs one warning per collapse.

        Raises:
          NumericError: the embedding has collapsed and `stop` is set.
        """
        settings, std = self.settings, summary.get(STD)
        self._low = self._low + 1 if std is not None and std < settings.min_std else 0
        if self._low != settings.patience:
            return
        rank = summary.get(PREFIX + "rank", float("nan"))
        message = (
            f"The embedding has collapsed: {STD} was below {settings.min_std} in the last "
            f"{settings.patience} log lines ({std:.4f} at step {step}, effective rank of the "
            f"features {rank:.1f}). Try a lower config.learning_rate.base_lr, a longer queue or "
            "another temperature. config.health configures this alarm."
        )
        if settings.stop:
            raise errors.NumericError(message)
        _LOG.warning(message)


def _gram(features: Array) -> Array:
    """Computes the smaller of Z Z^T and Z^T Z, f32[N, N] with N <= `ROWS`, of sampled features."""
    rows = _global_rows(features)
    if rows.shape[1] < rows.shape[0]:
        rows = rows.T
    return jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)


def _global_rows(rows: Array) -> Array:
    """Gathers the first rows of each replica, about `ROWS` in total and equally many of each."""
    return gather(rows[: max(ROWS // replicas(), 1)])


def _uniformity(rows: Array) -> Array:
    """Computes the log of the mean of exp(-2 |a - b|^2) over pairs of different unit rows."""
    count = len(rows)
    products = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
    potential = jnp.exp(-_SHARPNESS * (2 - 2 * products))
    others = jnp.sum(jnp.where(jnp.eye(count, dtype=bool), 0.0, potential))
    return jnp.log(others / (count * (count - 1)))


def _second_encoding(record: Record, view: int, dim: int) -> Array | None:
    """Returns another encoding of the same images, f32[B, dim] with unit rows, or None."""
    for network in ("student", "momentum", "teacher"):
        for number, encoded in record.encoded.get(network, {}).items():
            other = encoded.embedding
            if other is None or (network, number) == ("student", view):
                continue
            if other.shape[-1] == dim:
                return l2_normalize(other)
    return None


def _agreement(record: Record, queues: list[Queue]) -> Array | None:
    """Computes the share of images with the same nearest queue row for student and teacher.

    Uses the first queue of the teacher's width. Returns None if the outputs are not comparable.
    """
    teachers = record.encoded.get("teacher")
    if not teachers:
        return None
    students = record.encoded["student"]
    view = next((v for v in teachers if v in students), None)
    if view is None or teachers[view].embedding is None:
        return None
    teacher, student = (
        l2_normalize(record.embedding(name, view)) for name in ("teacher", "student")
    )
    if teacher.shape != student.shape:
        return None
    queue = next((q for q in queues if q.vectors.shape[1] == teacher.shape[1]), None)
    if queue is None:
        return None
    shared = bool(queue.shared)
    picks = [nearest(rows, queue.vectors, shared=shared) for rows in (student, teacher)]
    return jnp.mean((picks[0] == picks[1]).astype(jnp.float32))


def _is_queue(tree: Any) -> bool:
    return isinstance(tree, Queue)
