"""Losses on embeddings: pure float32 functions, most of which return one value per example."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.ops.collectives import pmean
from disco_jax.ops.queues import DEFAULT_ACCESS, QueueAccess, queue_attention, queue_logsumexp

# Products of unit rows that differ by at most this are equal up to rounding.
_TIE = 1e-6
# Added to variances, as by the BatchNorm of Barlow Twins' official code.
_VARIANCE_EPSILON = 1e-5


def info_nce(
    query: Array,
    key: Array,
    negatives: Array,
    *,
    temperature: float,
    reading: QueueAccess = DEFAULT_ACCESS,
) -> Array:
    """Computes the cross-entropy of identifying each query's key among a queue of negatives.

    MoCo (arXiv:1911.05722) eq. 1, RETRO eq. 1:
    loss_i = -log(e^{q_i.k_i/tau} / (e^{q_i.k_i/tau} + sum_j e^{q_i.n_j/tau})).

    Args:
      query: f32[B, D], unit rows; the only input that receives a gradient.
      key: f32[B, D], unit rows; row i is the positive of query i.
      negatives: f32 or bf16[K, D], unit rows, the same for the whole batch; receives no gradient.
      temperature: tau > 0, dimensionless; MoCo-v2 uses 0.2.
      reading: how the negatives are processed; see `queues.QueueAccess`.

    Returns:
      f32[B] in nats, one value per example; the objective takes the mean.

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    others = queue_logsumexp(query, negatives, temperature=temperature, reading=reading)
    return info_nce_beside(query, key, others.total, temperature=temperature)


def info_nce_beside(query: Array, key: Array, others: Array, *, temperature: float) -> Array:
    """Computes `info_nce` from the log-sum-exp over the negatives.

    Lets several keys or queries share one pass over the queue.

    Args:
      query, key: see `info_nce`.
      others: f32[B], `compared(query, negatives).total` at the same temperature.
      temperature: tau > 0.

    Returns:
      f32[B] in nats.

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    # Equals log(e^o + e^p) - p and is accurate for losses near 0.
    return jax.nn.softplus(others - _own(query, key) / temperature)


def contrast_accuracy(query: Array, key: Array, nearest: Array) -> Array:
    """Returns 1 for each query that is closer to its own key than to every negative, else 0.

    The margin must exceed rounding. The two products are summed in different orders, so either may
    be the larger one for a collapsed network, whose embeddings are all equal.

    Args:
      query: f32[B, D], unit rows.
      key: f32[B, D], unit rows.
      nearest: f32[B], `compared(query, negatives).nearest`.

    Returns:
      f32[B], 1 or 0.
    """
    return (_own(query, key) > nearest + _TIE).astype(jnp.float32)


def soft_cross_entropy(
    student: Array,
    teacher: Array,
    negatives: Array,
    *,
    student_temperature: float,
    teacher_temperature: float,
    reading: QueueAccess = DEFAULT_ACCESS,
    shared: bool = False,
) -> Array:
    """Computes the cross-entropy between the teacher's and the student's similarities to a queue.

    SEED (arXiv:2101.04731) eq. 5: both embeddings of an image are compared with D+ = [the
    teacher's embedding of the image, the queue]. The softmax of the teacher's similarities is the
    target for the student's:
    loss_i = -sum_j p^T_ij log p^S_ij.

    Args:
      student: f32[B, D], unit rows; the only input that receives a gradient.
      teacher: f32[B, D], unit rows; also the first element of D+.
      negatives: f32[K, D], unit rows: the queue of past teacher embeddings.
      student_temperature: tau_S > 0; SEED uses 0.2.
      teacher_temperature: tau_T >= 0; SEED's paper uses 0.01, its code 1e-4 (a near one-hot
        target). At 0 the target is one-hot on the image itself and the loss equals `info_nce`.
      reading: how the negatives are processed; see `queues.QueueAccess`. In one pass the loss is
        computed as the student's log-sum-exp over D+ minus its scaled similarity to the teacher's
        attention over D+, sum_j p^T_ij d_j, so that no probabilities are stored.
      shared: whether `negatives` are this replica's shard of the queue; see
        `queues.queue_logsumexp`. The loss is then computed in one pass, whatever
        `reading.one_pass` is.

    Returns:
      f32[B] in nats, one value per example; the objective takes the mean.

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    if teacher_temperature == 0 or reading.one_pass or shared:
        others = queue_logsumexp(
            student, negatives, temperature=student_temperature, reading=reading, shared=shared
        )
        if teacher_temperature == 0:
            return info_nce_beside(student, teacher, others.total, temperature=student_temperature)
        target = queue_attention(teacher, negatives, temperature=teacher_temperature, shared=shared)
        own = _own(student, teacher) / student_temperature
        return jnp.logaddexp(others.total, own) - _own(student, target) / student_temperature
    targets = jax.nn.softmax(_logits(teacher, teacher, negatives) / teacher_temperature, axis=-1)
    scores = _logits(student, teacher, negatives) / student_temperature
    return -jnp.sum(targets * jax.nn.log_softmax(scores, axis=-1), axis=-1)


def binary_contrast(
    student: Array, teacher: Array, negatives: Array, *, temperature: float, potential: Array
) -> Array:
    """Computes the binary cross-entropy of telling the teacher's embedding of an image from others.

    CRD (arXiv:1910.10699) eq. 17-18, a baseline in SEED's appendix:
    loss_i = -log h(s_i, t_i) - sum_j log(1 - h(s_i, n_j)),
    h(s, t) = e^{s.t/tau} / (e^{s.t/tau} + K m), with m the mean of e^{s.n/tau}. This is CRD's h
    with K / N, where the exponential is divided by N m as in its code; N is the number of images.

    Args:
      student: f32[B, D], unit rows; the only input that receives a gradient.
      teacher: f32[B, D], unit rows.
      negatives: f32[K, D], unit rows: past embeddings of the teacher.
      temperature: tau > 0; CRD uses 0.07.
      potential: f32[], m; receives no gradient; see `mean_potential`.

    Returns:
      f32[B] in nats, summed over the K + 1 binary decisions; the objective takes the mean.

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    logits = _logits(student, teacher, negatives) / temperature
    prior = jnp.log(len(negatives) * jax.lax.stop_gradient(potential))
    log_sum = jnp.logaddexp(logits, prior)
    return log_sum[:, 0] - logits[:, 0] + jnp.sum(log_sum[:, 1:] - prior, axis=-1)


def mean_potential(student: Array, negatives: Array, *, temperature: float) -> Array:
    """Returns f32[], the mean of e^{s.n/tau} over unit rows f32[B, D] and negatives f32[K, D]."""
    products = jnp.matmul(student, negatives.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.mean(jnp.exp(products / temperature))


def softened_cross_entropy(
    student: Array,
    teacher: Array,
    labels: Array,
    *,
    alpha: float = 0.5,
    temperature: float = 2.0,
    reduction: str = "element",
) -> Array:
    """Computes the supervised distillation loss from a teacher's softened classes and labels.

    Hinton et al. (arXiv:1503.02531): alpha T^2 KL(teacher || student) + (1 - alpha) CE. DisCo's
    code averages the divergence over classes as well as images (disagreement A1).

    Args:
      student: f32[B, C], logits; the only input that receives a gradient.
      teacher: f32[B, C], logits.
      labels: i32[B].
      alpha: in [0, 1], weight of the teacher's term; DisCo uses 0.5.
      temperature: T > 0; DisCo uses 2.
      reduction: of the divergence over classes: "element" divides it by C, "batch" does not.

    Returns:
      f32[B] in nats, one value per example; the caller takes the mean.

    Raises:
      AssertionError: while tracing, if a shape, a dtype or `reduction` differs from those above.
    """
    chex.assert_type([student, teacher], jnp.float32)
    chex.assert_equal_shape([student, teacher])
    chex.assert_shape(labels, student.shape[:1])
    assert reduction in ("element", "batch"), reduction
    target = jax.nn.log_softmax(teacher / temperature, axis=-1)
    log_probs = jax.nn.log_softmax(student / temperature, axis=-1)
    divergence = jnp.sum(jnp.exp(target) * (target - log_probs), axis=-1)
    if reduction == "element":
        divergence /= student.shape[-1]
    return alpha * temperature**2 * divergence + (1 - alpha) * class_cross_entropy(student, labels)


def class_cross_entropy(scores: Array, labels: Array) -> Array:
    """Returns f32[B] in nats, the cross-entropy of logits f32[B, C] with class labels i32[B]."""
    chex.assert_type(scores, jnp.float32)
    chex.assert_shape(labels, scores.shape[:1])
    of_label = jnp.take_along_axis(scores, labels[:, None].astype(jnp.int32), axis=-1)[:, 0]
    return jax.nn.logsumexp(scores, axis=-1) - of_label


def squared_distance(student: Array, teacher: Array) -> Array:
    """Returns the squared Euclidean distance of two embeddings, summed over the dimensions.

    DisCo (arXiv:2104.09124) eq. 1 for one view. Equals 2 - 2 cos for unit rows.

    Args:
      student: f32[B, D].
      teacher: f32[B, D].

    Returns:
      f32[B], one value per example.

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    chex.assert_type([student, teacher], jnp.float32)
    chex.assert_equal_shape([student, teacher])
    return jnp.sum(jnp.square(student - teacher), axis=-1)


def cross_correlation_loss(student: Array, teacher: Array, *, redundancy: float) -> Array:
    """Computes the Barlow Twins loss between the embeddings of two networks.

    Barlow Twins (arXiv:2103.03230) eq. 1: sum_i (1 - C_ii)^2 + lambda sum_i sum_{j != i} C_ij^2,
    where C_ij (eq. 2) is the correlation of the student's dimension i with the teacher's dimension
    j over the batch. Means, variances and C are computed in float32 over the global batch, so the
    loss depends on the global batch size but not on the number of devices. As in the official
    code, 1e-5 is added to the variances: a constant dimension has correlation 0.

    Call it inside `pmap` or `vmap` with `axis_name=AXIS`. It communicates D x D floats.

    Args:
      student: f32[B, D], not normalised; the only input that receives a gradient.
      teacher: f32[B, D], not normalised; row i is of the same image as row i of the student.
      redundancy: lambda >= 0, the weight of off-diagonal correlations; 5e-3 in the paper.

    Returns:
      f32[], summed over the D x D correlations, equal on all replicas.

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    chex.assert_type([student, teacher], jnp.float32)
    chex.assert_equal_shape([student, teacher])
    student, teacher = _standardize(student), _standardize(jax.lax.stop_gradient(teacher))
    products = jnp.matmul(student.T, teacher, precision=jax.lax.Precision.HIGHEST)
    correlation = pmean(products / len(student))
    diagonal = jnp.diagonal(correlation)
    off_diagonal = jnp.where(jnp.eye(len(correlation), dtype=bool), 0.0, correlation)
    invariance = jnp.sum(jnp.square(1 - diagonal))
    return invariance + redundancy * jnp.sum(jnp.square(off_diagonal))


def target_cross_entropy(targets: Array, scores: Array, *, temperature: float) -> Array:
    """Computes the cross-entropy of the softmax of scores with soft targets.

    SwAV (arXiv:2006.09882) eq. 2, with assignments as targets, and DINO (arXiv:2104.14294) eq. 2,
    with `sharpened` targets: loss_i = -sum_k t_ik log softmax(s_i / tau)_k.

    Args:
      targets: f32[B, K], rows that sum to 1; receives no gradient.
      scores: f32[B, K], of the student.
      temperature: tau > 0; 0.1 in both papers.

    Returns:
      f32[B] in nats, one value per example; the objective takes the mean.

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    chex.assert_type([targets, scores], jnp.float32)
    chex.assert_equal_shape([targets, scores])
    targets = jax.lax.stop_gradient(targets)
    return -jnp.sum(targets * jax.nn.log_softmax(scores / temperature, axis=-1), axis=-1)


def sharpened(scores: Array, centre: Array, temperature: Array | float) -> Array:
    """Computes DINO's targets, softmax((z - c) / tau) (arXiv:2104.14294, section 3.1).

    Args:
      scores: f32[B, K], of the momentum network.
      centre: f32[K], the running mean of those scores.
      temperature: tau > 0, lower than the student's temperature.

    Returns:
      f32[B, K], rows that sum to 1, without a gradient.

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    chex.assert_type([scores, centre], jnp.float32)
    chex.assert_shape(centre, (scores.shape[-1],))
    return jax.lax.stop_gradient(jax.nn.softmax((scores - centre[None]) / temperature, axis=-1))


def rebalanced(
    global_losses: Sequence[Array], local_losses: Sequence[Array], share: float | None = None
) -> Array:
    """Averages losses over pairs of views, with a separate weight for pairs of two global views.

    SSLight (arXiv:2210.02808) eq. 3: share * mean(global pairs) + (1 - share) * mean(local pairs).

    Args:
      global_losses: f32[] each, of pairs of two global views.
      local_losses: f32[] each, of pairs with a local view. The two lists together must have at
        least one loss.
      share: alpha in [0, 1], 0.4 in SSLight; None weights all pairs equally. Ignored if one of the
        lists is empty.

    Returns:
      f32[].
    """
    losses = jnp.stack([*global_losses, *local_losses])
    if share is None or not local_losses or not global_losses:
        return jnp.mean(losses)
    count = len(global_losses)
    return share * jnp.mean(losses[:count]) + (1 - share) * jnp.mean(losses[count:])


def _standardize(rows: Array) -> Array:
    """Returns rows [B, D] with mean 0 and variance 1 per dimension over the global batch."""
    centred = rows - pmean(jnp.mean(rows, axis=0, keepdims=True))
    variance = pmean(jnp.mean(jnp.square(centred), axis=0, keepdims=True))
    return centred * jax.lax.rsqrt(variance + _VARIANCE_EPSILON)


def _own(rows: Array, others: Array) -> Array:
    """Returns f32[B], the similarity of row i to others[i]."""
    chex.assert_type([rows, others], jnp.float32)
    chex.assert_equal_shape([rows, others])
    return jnp.sum(rows * others, axis=-1)


def _logits(rows: Array, first: Array, negatives: Array) -> Array:
    """Returns f32[B, 1 + K], the similarity of row i to first[i], then to every negative."""
    chex.assert_type([rows, first, negatives], jnp.float32)
    chex.assert_equal_shape([rows, first])
    chex.assert_shape(negatives, (None, rows.shape[-1]))
    # Accelerators default to bfloat16 products. After division by temperatures down to 1e-4 their
    # error would be whole units.
    others = jnp.matmul(rows, negatives.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([_own(rows, first)[:, None], others], axis=-1)
