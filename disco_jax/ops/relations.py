"""Losses on relations: between the embeddings of a batch, to a bank, between places of a map."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.ops.losses import unit

_HIGHEST = jax.lax.Precision.HIGHEST
# Rows are equal if the squared length of their difference is below this share of their own: ten
# times the rounding of float32 a row, squared.
_ROUNDING = 1e-12
# Of equal rows, as in RKD's code, whose distances are the root of at least 1e-12.
_MIN_DISTANCE = 1e-6
_TINY = 1e-30  # keeps the distance of a single row, which has no others, at 0


def rkd_distance(student: Array, teacher: Array) -> Array:
    """How far the student's pairwise distances are from the teacher's.

    RKD (arXiv:1904.05068) eq. 4-6: both matrices of Euclidean distances are divided by the mean of
    their entries off the diagonal (the gradient passes through the student's mean) and compared by
    the Huber loss with delta 1, averaged over the B x B entries, the diagonal included.

    Args:
      student: f32[B, D]; the only input that needs a gradient.
      teacher: f32[B, E].

    Returns:
      f32[], which depends on B.

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    _check_batches(student, teacher)
    return jnp.mean(_huber(_scaled_distances(student) - _scaled_distances(teacher)))


def rkd_angle(student: Array, teacher: Array) -> Array:
    """How far the angles in the student's triangles are from those in the teacher's.

    RKD (arXiv:1904.05068) eq. 7-9: the cosine at i between the directions to j and to k, compared
    by the Huber loss with delta 1 and averaged over all B^3 triples.

    Args:
      student: f32[B, D]; the only input that needs a gradient.
      teacher: f32[B, E].

    Returns:
      f32[], which depends on B.

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    _check_batches(student, teacher)
    return jnp.mean(_huber(_cosines(student) - _cosines(teacher)))


def bank_cross_entropy(
    student: Array,
    target: Array,
    student_bank: Array,
    target_bank: Array,
    *,
    student_temperature: float,
    target_temperature: float,
) -> Array:
    """Cross-entropy between a target's similarities to its bank and the student's to its own.

    ReSSL (arXiv:2107.09282) eq. 5, where both banks are one; the target's own embedding is not
    among them: loss_i = -sum_j p_ij log s_ij.

    Args:
      student: f32[B, D], unit rows; the only input that needs a gradient.
      target: f32[B, E], unit rows.
      student_bank: f32[K, D]: what the student is compared with.
      target_bank: f32[K, E]: row j is of the same image as row j of the other bank.
      student_temperature: > 0; CompRess uses 0.04, ReSSL 0.1.
      target_temperature: > 0; both use 0.04.

    Returns:
      f32[B] in nats, one value an example; the objective takes the mean.

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    own = _log_shares(student, student_bank, student_temperature)
    theirs = _log_shares(target, target_bank, target_temperature)
    return -jnp.sum(jnp.exp(theirs) * own, axis=-1)


def bank_divergence(
    student: Array,
    target: Array,
    student_bank: Array,
    target_bank: Array,
    *,
    student_temperature: float,
    target_temperature: float,
) -> Array:
    """`bank_cross_entropy` less the target's entropy. CompRess (arXiv:2010.14713) eq. 1-2.

    Args:
      student, target, student_bank, target_bank, student_temperature, target_temperature: see
        `bank_cross_entropy`.

    Returns:
      f32[B] in nats, at least 0: KL(target || student), one value an example.

    Raises:
      AssertionError: while tracing, when a shape or dtype does not hold.
    """
    own = _log_shares(student, student_bank, student_temperature)
    theirs = _log_shares(target, target_bank, target_temperature)
    return jnp.sum(jnp.exp(theirs) * (theirs - own), axis=-1)


def attention(maps: Array, size: tuple[int, int]) -> Array:
    """Where a feature map is active: the mean square over its channels, as unit vectors.

    Attention transfer (arXiv:1612.03928) eq. 2 with F^2 averaged over the channels.

    Args:
      maps: float[B, H, W, C].
      size: height and width that the mean square is resized to, if it has others.

    Returns:
      f32[B, height * width], unit rows.
    """
    power = jnp.mean(jnp.square(maps.astype(jnp.float32)), axis=-1)
    if power.shape[1:] != size:
        power = jax.image.resize(power, (len(power), *size), "linear")
    return unit(power.reshape(len(power), -1))


def attention_distance(student: Array, teacher: Array) -> Array:
    """Mean squared difference of two attentions over all places. AT (arXiv:1612.03928) eq. 2.

    Args:
      student: float[B, H, W, C]; the only input that needs a gradient.
      teacher: float[B, H', W', E]; of another size it is resized, linearly and antialiased.

    Returns:
      f32[B], one value an example; the objective takes the mean.
    """
    size = student.shape[1:3]
    return jnp.mean(jnp.square(attention(student, size) - attention(teacher, size)), axis=-1)


def _log_shares(rows: Array, bank: Array, temperature: float) -> Array:
    """f32[B, K]: log softmax of the similarities to a bank."""
    chex.assert_type([rows, bank], jnp.float32)
    chex.assert_shape(bank, (None, rows.shape[-1]))
    return jax.nn.log_softmax(jnp.matmul(rows, bank.T, precision=_HIGHEST) / temperature, axis=-1)


def _scaled_distances(rows: Array) -> Array:
    """f32[B, B]: Euclidean distances over the mean off the diagonal; 0 on the diagonal."""
    _, squared, apart = _pairs(rows)
    distances = jnp.where(apart, jnp.sqrt(squared), _MIN_DISTANCE)
    distances = jnp.where(_diagonal(rows), 0.0, distances)
    count = len(rows)
    return distances / (jnp.sum(distances) / max(count * (count - 1), 1) + _TINY)


def _cosines(rows: Array) -> Array:
    """f32[B, B, B]: at i, the cosine between the directions to j and to k."""
    differences, squared, apart = _pairs(rows)
    directions = jnp.where(apart[..., None], differences * jax.lax.rsqrt(squared)[..., None], 0.0)
    return jnp.einsum("ijd,ikd->ijk", directions, directions, precision=_HIGHEST)


def _pairs(rows: Array) -> tuple[Array, Array, Array]:
    """Differences between all pairs of rows, and which pairs have a direction.

    Equal rows have none. Their difference is exactly 0 only as long as the compiler does not merge
    it with the arithmetic that made the rows (a * b - c in one instruction leaves a residue of
    rounding, which has a direction and a derivative of 1e7), so pairs are told apart by a margin
    above rounding and the diagonal by its place.

    Args:
      rows: f32[B, D].

    Returns:
      f32[B, B, D], at (i, j) rows[j] - rows[i]; f32[B, B], their squared lengths, 1 where the rows
      are equal; bool[B, B], false where they are.
    """
    differences = rows[None, :, :] - rows[:, None, :]
    squared = jnp.sum(jnp.square(differences), axis=-1)
    power = jnp.sum(jnp.square(rows), axis=-1)
    apart = squared > _ROUNDING * (power[:, None] + power[None, :])
    apart &= ~_diagonal(rows)
    return differences, jnp.where(apart, squared, 1.0), apart


def _diagonal(rows: Array) -> Array:
    return jnp.eye(len(rows), dtype=bool)


def _huber(difference: Array) -> Array:
    size = jnp.abs(difference)
    return jnp.where(size < 1, 0.5 * jnp.square(difference), size - 0.5)


def _check_batches(student: Array, teacher: Array) -> None:
    chex.assert_type([student, teacher], jnp.float32)
    chex.assert_rank([student, teacher], 2)
    chex.assert_equal_shape_prefix([student, teacher], 1)
