"""Losses on embeddings: one value an example, float32, no network and no config."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.ops.bank import USUAL, Reading, attended, compared

# Products of unit rows that differ by no more are equal but for rounding.
_TIE = 1e-6


def info_nce(
    query: Array,
    key: Array,
    negatives: Array,
    *,
    temperature: float,
    reading: Reading = USUAL,
) -> Array:
    """Cross-entropy of picking each query's own key among a bank of negatives.

    MoCo (arXiv:1911.05722) eq. 1, RETRO eq. 1:
    loss_i = -log(e^{q_i.k_i/tau} / (e^{q_i.k_i/tau} + sum_j e^{q_i.n_j/tau})).

    Args:
      query: f32[B, D], unit rows; the only input that needs a gradient.
      key: f32[B, D], unit rows; row i is the positive of query i.
      negatives: f32 or bf16[K, D], unit rows, shared by the whole batch; no gradient passes.
      temperature: tau > 0, no unit; MoCo-v2 uses 0.2.
      reading: of the negatives; see `bank.Reading`.

    Returns:
      f32[B] in nats, one value an example; the objective takes the mean.

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    others = compared(query, negatives, temperature=temperature, reading=reading)
    return info_nce_beside(query, key, others.total, temperature=temperature)


def info_nce_beside(query: Array, key: Array, others: Array, *, temperature: float) -> Array:
    """`info_nce` where the bank has been read: several keys, or queries at once, share that.

    Args:
      query, key: see `info_nce`.
      others: f32[B], `compared(query, negatives).total` of the same temperature.
      temperature: tau > 0.

    Returns:
      f32[B] in nats.

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    # log(e^o + e^p) - p, which stays exact where the loss is near 0.
    return jax.nn.softplus(others - _own(query, key) / temperature)


def contrast_accuracy(query: Array, key: Array, nearest: Array) -> Array:
    """Whether each query is closer to its own key than to every negative, by more than rounding.

    The two products are summed in different orders: of a collapsed network, whose embeddings are
    all equal, either may come out as the larger one.

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
    reading: Reading = USUAL,
    shared: bool = False,
) -> Array:
    """Cross-entropy between the teacher's and the student's similarities to a bank.

    SEED (arXiv:2101.04731) eq. 5: both embeddings of an image are compared with D+ = [the
    teacher's own embedding of it, the bank]; the softmax of the teacher's similarities is the
    target of the student's:
    loss_i = -sum_j p^T_ij log p^S_ij.

    Args:
      student: f32[B, D], unit rows; the only input that needs a gradient.
      teacher: f32[B, D], unit rows; also the first column of the bank.
      negatives: f32[K, D], unit rows: past embeddings of the teacher.
      student_temperature: tau_S > 0; SEED uses 0.2.
      teacher_temperature: tau_T >= 0; SEED's paper uses 0.01, its code 1e-4 (a near one-hot
        target). At 0 the target is one-hot on the image itself and the loss is `info_nce`.
      reading: of the negatives; see `bank.Reading`. In one pass the loss is the log of the
        student's denominator less its similarity to what the teacher reads of D+ by attention,
        sum_j p^T_ij d_j, so that no probabilities are kept.
      shared: whether `negatives` are this replica's part of the bank; see `bank.compared`. The
        loss is then that of one pass, whatever `reading` says.

    Returns:
      f32[B] in nats, one value an example; the objective takes the mean.

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    if teacher_temperature == 0 or reading.one_pass or shared:
        others = compared(
            student, negatives, temperature=student_temperature, reading=reading, shared=shared
        )
        if teacher_temperature == 0:
            return info_nce_beside(student, teacher, others.total, temperature=student_temperature)
        target = attended(teacher, negatives, temperature=teacher_temperature, shared=shared)
        own = _own(student, teacher) / student_temperature
        return jnp.logaddexp(others.total, own) - _own(student, target) / student_temperature
    targets = jax.nn.softmax(_logits(teacher, teacher, negatives) / teacher_temperature, axis=-1)
    scores = _logits(student, teacher, negatives) / student_temperature
    return -jnp.sum(targets * jax.nn.log_softmax(scores, axis=-1), axis=-1)


def binary_contrast(
    student: Array, teacher: Array, negatives: Array, *, temperature: float, potential: Array
) -> Array:
    """Telling the teacher's embedding of the image from those of others, one yes or no each.

    CRD (arXiv:1910.10699) eq. 17-18, as SEED's appendix compares with:
    loss_i = -log h(s_i, t_i) - sum_j log(1 - h(s_i, n_j)),
    h(s, t) = e^{s.t/tau} / (e^{s.t/tau} + K m), m the mean of e^{s.n/tau}: CRD's K / N with the
    exponential divided, as in its code, by the number N of images times its mean.

    Args:
      student: f32[B, D], unit rows; the only input that needs a gradient.
      teacher: f32[B, D], unit rows.
      negatives: f32[K, D], unit rows: past embeddings of the teacher.
      temperature: tau > 0; CRD uses 0.07.
      potential: f32[], m, a constant to the gradient; see `mean_potential`.

    Returns:
      f32[B] in nats, summed over the K + 1 decisions; the objective takes the mean.

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    logits = _logits(student, teacher, negatives) / temperature
    prior = jnp.log(len(negatives) * jax.lax.stop_gradient(potential))
    total = jnp.logaddexp(logits, prior)
    return total[:, 0] - logits[:, 0] + jnp.sum(total[:, 1:] - prior, axis=-1)


def mean_potential(student: Array, negatives: Array, *, temperature: float) -> Array:
    """f32[]: the mean of e^{s.n/tau} over unit rows f32[B, D] and negatives f32[K, D]."""
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
    """Supervised distillation: a teacher's softened classes beside the labels.

    Hinton et al. (arXiv:1503.02531): alpha T^2 KL(teacher || student) + (1 - alpha) CE. DisCo's
    code averages the divergence over the classes as well as the images (disagreement A1).

    Args:
      student: f32[B, C], logits; the only input that needs a gradient.
      teacher: f32[B, C], logits.
      labels: i32[B].
      alpha: in 0..1, the share of the teacher; DisCo uses 0.5.
      temperature: T > 0; DisCo uses 2.
      reduction: of the divergence: "element" divides it by C, "batch" does not.

    Returns:
      f32[B] in nats, one value an example; the caller takes the mean.

    Raises:
      AssertionError: while tracing, when a shape, dtype or the reduction is another.
    """
    chex.assert_type([student, teacher], jnp.float32)
    chex.assert_equal_shape([student, teacher])
    chex.assert_shape(labels, student.shape[:1])
    assert reduction in ("element", "batch"), reduction
    target = jax.nn.log_softmax(teacher / temperature, axis=-1)
    given = jax.nn.log_softmax(student / temperature, axis=-1)
    divergence = jnp.sum(jnp.exp(target) * (target - given), axis=-1)
    if reduction == "element":
        divergence /= student.shape[-1]
    return alpha * temperature**2 * divergence + (1 - alpha) * class_cross_entropy(student, labels)


def class_cross_entropy(scores: Array, labels: Array) -> Array:
    """f32[B] in nats: cross-entropy of f32[B, C] logits with the classes i32[B]."""
    chex.assert_type(scores, jnp.float32)
    chex.assert_shape(labels, scores.shape[:1])
    chosen = jnp.take_along_axis(scores, labels[:, None].astype(jnp.int32), axis=-1)[:, 0]
    return jax.nn.logsumexp(scores, axis=-1) - chosen


def squared_distance(student: Array, teacher: Array) -> Array:
    """Squared Euclidean distance of two embeddings, summed over the dimensions.

    DisCo (arXiv:2104.09124) eq. 1 for one view; 2 - 2 cos for unit rows.

    Args:
      student: f32[B, D].
      teacher: f32[B, D].

    Returns:
      f32[B], one value an example.

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    chex.assert_type([student, teacher], jnp.float32)
    chex.assert_equal_shape([student, teacher])
    return jnp.sum(jnp.square(student - teacher), axis=-1)


def target_cross_entropy(targets: Array, scores: Array, *, temperature: float) -> Array:
    """Cross-entropy of the softmax of scores to soft targets.

    SwAV (arXiv:2006.09882) eq. 2, with assignments as targets; DINO (arXiv:2104.14294) eq. 2, with
    `sharpened` ones: loss_i = -sum_k t_ik log softmax(s_i / tau)_k.

    Args:
      targets: f32[B, K], rows that sum to 1; no gradient passes.
      scores: f32[B, K], of the student.
      temperature: tau > 0; 0.1 in both papers.

    Returns:
      f32[B] in nats, one value an example; the objective takes the mean.

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    chex.assert_type([targets, scores], jnp.float32)
    chex.assert_equal_shape([targets, scores])
    targets = jax.lax.stop_gradient(targets)
    return -jnp.sum(targets * jax.nn.log_softmax(scores / temperature, axis=-1), axis=-1)


def sharpened(scores: Array, centre: Array, temperature: Array | float) -> Array:
    """DINO's targets (arXiv:2104.14294, section 3.1): softmax((z - c) / tau).

    Args:
      scores: f32[B, K], of the momentum network.
      centre: f32[K], the running mean of its scores.
      temperature: tau > 0, below the student's.

    Returns:
      f32[B, K], rows that sum to 1; no gradient passes.

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    chex.assert_type([scores, centre], jnp.float32)
    chex.assert_shape(centre, (scores.shape[-1],))
    return jax.lax.stop_gradient(jax.nn.softmax((scores - centre[None]) / temperature, axis=-1))


def rebalanced(
    global_losses: Sequence[Array], local_losses: Sequence[Array], share: float | None = None
) -> Array:
    """The mean over pairs of views, with a chosen weight on those of two global views.

    SSLight (arXiv:2210.02808) eq. 3: share * mean(global pairs) + (1 - share) * mean(local pairs).

    Args:
      global_losses: f32[] each, of pairs of two global views.
      local_losses: f32[] each, of pairs with a local view. One pair at least in the two together.
      share: alpha in [0, 1], 0.4 in SSLight; None: every pair counts the same, as they do where
        there is only one kind of pairs.

    Returns:
      f32[].
    """
    every = jnp.stack([*global_losses, *local_losses])
    if share is None or not local_losses or not global_losses:
        return jnp.mean(every)
    between = len(global_losses)
    return share * jnp.mean(every[:between]) + (1 - share) * jnp.mean(every[between:])


def unit(rows: Array) -> Array:
    """Rows scaled to Euclidean length 1, in float32; a zero row stays zero.

    x / max(|x|, 1e-12), as PyTorch's `normalize`, with a gradient that is finite everywhere.

    Args:
      rows: float[..., D].

    Returns:
      f32[..., D].
    """
    rows = rows.astype(jnp.float32)
    square = jnp.sum(jnp.square(rows), axis=-1, keepdims=True)
    return rows * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def _own(rows: Array, others: Array) -> Array:
    """f32[B]: similarity of row i to others[i]."""
    chex.assert_type([rows, others], jnp.float32)
    chex.assert_equal_shape([rows, others])
    return jnp.sum(rows * others, axis=-1)


def _logits(rows: Array, first: Array, negatives: Array) -> Array:
    """f32[B, 1 + K]: similarity of row i to first[i], then to every negative."""
    chex.assert_type([rows, first, negatives], jnp.float32)
    chex.assert_equal_shape([rows, first])
    chex.assert_shape(negatives, (None, rows.shape[-1]))
    # The similarities are divided by temperatures down to 1e-4: bfloat16 products, the default of
    # accelerators, would be off by units.
    others = jnp.matmul(rows, negatives.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([_own(rows, first)[:, None], others], axis=-1)
