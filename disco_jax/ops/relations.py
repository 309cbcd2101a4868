"""Losses on relations: between embeddings of a batch, to a queue, and between map positions."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.ops.vectors import l2_normalize

_HIGHEST = jax.lax.Precision.HIGHEST
# Two rows count as equal if the squared length of their difference is at most this fraction of the
# sum of their squared lengths: ten times the rounding of float32 per row, squared.
_ROUNDING = 1e-12
# Distance of equal rows, as in RKD's code, which takes the square root of at least 1e-12.
_MIN_DISTANCE = 1e-6
_TINY = 1e-30  # avoids 0 / 0 for a batch of one row


def rkd_distance(student: Array, teacher: Array) -> Array:
    """Computes the Huber loss between the student's and the teacher's pairwise distances.

    RKD (arXiv:1904.05068) eq. 4-6: both matrices of Euclidean distances are divided by the mean of
    their off-diagonal entries (the gradient passes through the student's mean). The Huber loss has
    delta 1 and is averaged over the B x B entries, including the diagonal.

    Args:
      student: f32[B, D]; the only input that receives a gradient.
      teacher: f32[B, E].

    Returns:
      f32[]; depends on B.

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    _check_batches(student, teacher)
    return jnp.mean(_huber(_scaled_distances(student) - _scaled_distances(teacher)))


def rkd_angle(student: Array, teacher: Array) -> Array:
    """Computes the Huber loss between the student's and the teacher's angles of row triples.

    RKD (arXiv:1904.05068) eq. 7-9: compares the cosines at i between the directions to j and to k.
    The Huber loss has delta 1 and is averaged over all B^3 triples.

    Args:
      student: f32[B, D]; the only input that receives a gradient.
      teacher: f32[B, E].

    Returns:
      f32[]; depends on B.

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    _check_batches(student, teacher)
    return jnp.mean(_huber(_cosines(student) - _cosines(teacher)))


def bank_cross_entropy(
    student: Array,
    target: Array,
    student_queue: Array,
    target_queue: Array,
    *,
    student_temperature: float,
    target_temperature: float,
) -> Array:
    """Computes the cross-entropy between a target's and a student's similarities to queues.

    ReSSL (arXiv:2107.09282) eq. 5, which uses one queue for both. The target's own embedding is not
    an element of the queue: loss_i = -sum_j p_ij log s_ij.

    Args:
      student: f32[B, D], unit rows; the only input that receives a gradient.
      target: f32[B, E], unit rows.
      student_queue: f32[K, D], compared with the student's rows.
      target_queue: f32[K, E], compared with the target's rows. Row j is of the same image as row j
        of `student_queue`.
      student_temperature: > 0; CompRess uses 0.04, ReSSL 0.1.
      target_temperature: > 0; both use 0.04.

    Returns:
      f32[B] in nats, one value per example; the objective takes the mean.

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    student_log_probs = _log_probs(student, student_queue, student_temperature)
    target_log_probs = _log_probs(target, target_queue, target_temperature)
    return -jnp.sum(jnp.exp(target_log_probs) * student_log_probs, axis=-1)


def bank_divergence(
    student: Array,
    target: Array,
    student_queue: Array,
    target_queue: Array,
    *,
    student_temperature: float,
    target_temperature: float,
) -> Array:
    """Computes KL(target || student) between similarities to queues.

    CompRess (arXiv:2010.14713) eq. 1-2: `bank_cross_entropy` minus the target's entropy.

    Args:
      student, target, student_queue, target_queue, student_temperature, target_temperature: see
        `bank_cross_entropy`.

    Returns:
      f32[B] in nats, at least 0, one value per example.

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those of
        `bank_cross_entropy`.
    """
    student_log_probs = _log_probs(student, student_queue, student_temperature)
    target_log_probs = _log_probs(target, target_queue, target_temperature)
    difference = target_log_probs - student_log_probs
    return jnp.sum(jnp.exp(target_log_probs) * difference, axis=-1)


def attention(maps: Array, size: tuple[int, int]) -> Array:
    """Returns the activation-based attention of feature maps as unit vectors.

    Attention transfer (arXiv:1612.03928) eq. 2 with F^2 averaged over the channels.

    Args:
      maps: float[B, H, W, C].
      size: height and width of the result; the mean square is resized to it, linearly and
        antialiased, where it differs.

    Returns:
      f32[B, height * width], unit rows.
    """
    power = jnp.mean(jnp.square(maps.astype(jnp.float32)), axis=-1)
    if power.shape[1:] != size:
        power = jax.image.resize(power, (len(power), *size), "linear")
    return l2_normalize(power.reshape(len(power), -1))


def attention_distance(student: Array, teacher: Array) -> Array:
    """Returns the mean squared difference of two attention maps. AT (arXiv:1612.03928) eq. 2.

    Args:
      student: float[B, H, W, C]; the only input that receives a gradient.
      teacher: float[B, H', W', E]; resized to H x W if its size differs, linearly and antialiased.

    Returns:
      f32[B], one value per example; the objective takes the mean.
    """
    size = student.shape[1], student.shape[2]
    return jnp.mean(jnp.square(attention(student, size) - attention(teacher, size)), axis=-1)


def _log_probs(rows: Array, queue: Array, temperature: float) -> Array:
    """Returns f32[B, K], the log-softmax of the similarities to a queue."""
    chex.assert_type([rows, queue], jnp.float32)
    chex.assert_shape(queue, (None, rows.shape[-1]))
    return jax.nn.log_softmax(jnp.matmul(rows, queue.T, precision=_HIGHEST) / temperature, axis=-1)


def _scaled_distances(rows: Array) -> Array:
    """Returns f32[B, B], Euclidean distances divided by their off-diagonal mean."""
    _, squared, distinct = _pairs(rows)
    distances = jnp.where(distinct, jnp.sqrt(squared), _MIN_DISTANCE)
    distances = jnp.where(_diagonal(rows), 0.0, distances)
    count = len(rows)
    return distances / (jnp.sum(distances) / max(count * (count - 1), 1) + _TINY)


def _cosines(rows: Array) -> Array:
    """Returns f32[B, B, B], at (i, j, k) the cosine at i between the directions to j and to k."""
    differences, squared, distinct = _pairs(rows)
    directions = jnp.where(
        distinct[..., None], differences * jax.lax.rsqrt(squared)[..., None], 0.0
    )
    return jnp.einsum("ijd,ikd->ijk", directions, directions, precision=_HIGHEST)


def _pairs(rows: Array) -> tuple[Array, Array, Array]:
    """Returns the differences between all pairs of rows and a mask of the distinct pairs.

    Equal rows have no direction between them. Their difference is exactly 0 only if the compiler
    does not fuse it with the arithmetic that produced the rows: a * b - c in one instruction leaves
    a rounding residue, which has a direction and a derivative of 1e7. Equal rows are therefore
    detected by a margin above rounding, and the diagonal by its indices.

    Args:
      rows: f32[B, D].

    Returns:
      f32[B, B, D], rows[j] - rows[i] at (i, j); f32[B, B], their squared lengths, 1 for equal rows;
      bool[B, B], false for equal rows.
    """
    differences = rows[None, :, :] - rows[:, None, :]
    squared = jnp.sum(jnp.square(differences), axis=-1)
    power = jnp.sum(jnp.square(rows), axis=-1)
    distinct = squared > _ROUNDING * (power[:, None] + power[None, :])
    distinct &= ~_diagonal(rows)
    return differences, jnp.where(distinct, squared, 1.0), distinct


def _diagonal(rows: Array) -> Array:
    return jnp.eye(len(rows), dtype=bool)


def _huber(difference: Array) -> Array:
    size = jnp.abs(difference)
    return jnp.where(size < 1, 0.5 * jnp.square(difference), size - 0.5)


def _check_batches(student: Array, teacher: Array) -> None:
    chex.assert_type([student, teacher], jnp.float32)
    chex.assert_rank([student, teacher], 2)
    chex.assert_equal_shape_prefix([student, teacher], 1)
