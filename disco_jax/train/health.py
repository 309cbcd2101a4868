"""Label-free signals of a run: does the student spread, does it follow, has it collapsed?"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from disco_jax import errors
from disco_jax.methods.base import Record, spread
from disco_jax.ops.bank import closest
from disco_jax.ops.collectives import gather, pmean, replicas
from disco_jax.ops.losses import squared_distance, unit
from disco_jax.ops.memory import Queue

_LOG = logging.getLogger(__name__)

PREFIX = "health/"
STD = PREFIX + "std"  # always there where signals are
# Rows of the global batch that rank and uniformity are measured on: enough for embeddings of 128,
# and a matrix that costs nothing beside a network.
ROWS = 256
# Uniformity of rows drawn from the whole sphere in many dimensions is about -4; of equal ones 0.
_SHARPNESS = 2.0


def measured(
    record: Record, memory: Mapping[str, Any], step: Array, every: int
) -> dict[str, Array]:
    """`signals` of all replicas every so many steps, for they are read no more often.

    Args:
      record, memory: see `signals`.
      step: i32[], equal on all replicas; measured where step + 1 is a multiple of `every`.
      every: 1 or more.

    Returns:
      name -> array, equal on all replicas; NaN in the steps between.
    """

    def now() -> dict[str, Array]:
        return pmean(signals(record, memory, step))

    def later() -> dict[str, Array]:
        return jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(now))

    return jax.lax.cond((step + 1) % every == 0, now, later)


def signals(record: Record, memory: Mapping[str, Any], step: Array) -> dict[str, Array]:
    """What the step tells of the student, of view by view and of its queues.

    Args:
      record: of this replica.
      memory: of the method, as it is before this step.
      step: i32[].

    Returns:
      name -> f32[], to be averaged over replicas: "health/std" (`spread` of the embedding, 1 if
      even, 0 if collapsed), "health/uniformity" and "health/alignment" (arXiv:2005.10242: the log
      of the mean Gaussian potential of two images; the mean squared distance of two encodings of
      one image: by the student, else by the momentum network, else by the teacher),
      "health/agreement" (how often student and teacher pick the same nearest row of a queue) and
      "health/queue_age" (steps since the oldest row of the longest queue came in); each where
      there is what it needs. And "health/rank", f32[N, N]: a Gram matrix of the features, which
      `effective_rank` reads.
    """
    view, first = next(iter(record.encoded["student"].items()))
    embedding = unit(first.embedding)
    found = {"std": spread(embedding), "rank": _gram(first.features)}
    if len(embedding) * replicas() > 1:
        found["uniformity"] = _uniformity(_some(embedding))
    other = _other(record, view, embedding.shape[-1])
    if other is not None:
        found["alignment"] = jnp.mean(squared_distance(embedding, other))
    queues = [q for q in jax.tree.leaves(memory, is_leaf=_is_queue) if _is_queue(q)]
    if queues:
        pushes = max(queue.size for queue in queues) / (len(embedding) * replicas())
        found["queue_age"] = jnp.minimum(step.astype(jnp.float32), jnp.float32(pushes))
    agreement = _agreement(record, queues)
    if agreement is not None:
        found["agreement"] = agreement
    return {PREFIX + name: value for name, value in found.items()}


def effective_rank(gram: np.ndarray) -> float:
    """RankMe (arXiv:2210.02885) eq. 1: exp of the entropy of the normalised singular values.

    Args:
      gram: f32[N, N]: Z Z^T or Z^T Z of the features Z; its eigenvalues are the squared singular
        values of Z.

    Returns:
      Between 1 (all features on one line) and N.
    """
    squares = np.linalg.eigvalsh(np.asarray(gram, np.float64))
    values = np.sqrt(np.maximum(squares, 0.0))
    shares = values / max(values.sum(), 1e-12) + 1e-12
    return float(np.exp(-np.sum(shares * np.log(shares))))


@dataclasses.dataclass
class Watch:
    """Looks at the summaries of a run and raises the alarm when the embedding has collapsed.

    Attributes:
      min_std: "health/std" below this is a collapse; 0: never.
      patience: summaries in a row, before it is one. Networks start nearly collapsed.
      stop: end the run instead of warning.
    """

    min_std: float
    patience: int
    stop: bool
    _low: int = 0

    def __call__(self, step: int, summary: Mapping[str, float]) -> None:
        """Takes a summary; warns once a collapse.

        Raises:
          NumericError: it has collapsed and `stop` is set.
        """
        std = summary.get(STD)
        self._low = self._low + 1 if std is not None and std < self.min_std else 0
        if self._low != self.patience:
            return
        rank = summary.get(PREFIX + "rank", float("nan"))
        message = (
            f"The embedding has collapsed: its deviation was below {self.min_std} in the last "
            f"{self.patience} log lines ({std:.4f} at step {step}, effective rank of the features "
            f"{rank:.1f}). A lower config.learning_rate.per_256, a longer queue or another "
            "temperature may help; config.health sets this alarm."
        )
        if self.stop:
            raise errors.NumericError(message)
        _LOG.warning(message)


def _gram(features: Array) -> Array:
    """f32[N, N], N at most `ROWS`: from as many rows of the global batch."""
    rows = _some(features)
    if rows.shape[1] < rows.shape[0]:
        rows = rows.T
    return jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)


def _some(rows: Array) -> Array:
    """At most `ROWS` rows of the global batch, as many of each replica."""
    return gather(rows[: max(ROWS // replicas(), 1)])


def _uniformity(rows: Array) -> Array:
    """f32[]: log of the mean over two different unit rows of e^(-2 |a - b|^2)."""
    count = len(rows)
    products = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
    potential = jnp.exp(-_SHARPNESS * (2 - 2 * products))
    others = jnp.sum(jnp.where(jnp.eye(count, dtype=bool), 0.0, potential))
    return jnp.log(others / (count * (count - 1)))


def _other(record: Record, view: int, dim: int) -> Array | None:
    """f32[B, dim], unit rows: another encoding of the same images."""
    for network in ("student", "momentum", "teacher"):
        for number, encoded in record.encoded.get(network, {}).items():
            if (network, number) != ("student", view) and encoded.embedding.shape[-1] == dim:
                return unit(encoded.embedding)
    return None


def _agreement(record: Record, queues: list[Queue]) -> Array | None:
    """f32[]: share of images for which student and teacher pick the same row of the first queue."""
    teachers = record.encoded.get("teacher")
    if not teachers:
        return None
    students = record.encoded["student"]
    view = next((v for v in teachers if v in students), None)
    if view is None:
        return None
    teacher, student = unit(teachers[view].embedding), unit(students[view].embedding)
    if teacher.shape != student.shape:
        return None
    queue = next((q for q in queues if q.vectors.shape[1] == teacher.shape[1]), None)
    if queue is None:
        return None
    shared = bool(queue.shared)
    picks = [closest(rows, queue.vectors, shared=shared) for rows in (student, teacher)]
    return jnp.mean((picks[0] == picks[1]).astype(jnp.float32))


def _is_queue(tree: Any) -> bool:
    return isinstance(tree, Queue)
