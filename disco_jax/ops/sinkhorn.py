"""Balanced assignment of embeddings to prototypes, over the batch of all replicas."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.ops.collectives import highest, total


def sinkhorn(scores: Array, *, epsilon: float, iterations: int, mask: Array | None = None) -> Array:
    """Soft assignments that use every prototype equally: Sinkhorn-Knopp's algorithm.

    SwAV (arXiv:2006.09882) eq. 3 to 5: Q = diag(u) exp(C^T Z / epsilon) diag(v), with u and v from
    `iterations` rounds that scale every prototype's share of the global batch to 1/K and then
    every example's to 1/B. As the last scaling is of the examples, rows sum to 1 exactly and
    prototypes are balanced up to the convergence of the rounds.

    The greatest score is subtracted first, which the normalisation cancels: exp cannot overflow.
    Rows are counted over all replicas, so the result does not depend on their number.

    Args:
      scores: f32[B, K], of this replica's rows on the prototypes.
      epsilon: of the entropy, > 0; 0.05 in SwAV. The smaller, the harder the assignment.
      iterations: rounds, 1 or more; 3 in SwAV.
      mask: f32[B], 1 for rows that count and 0 for those that are not there; None: all count.
        At least one row of all replicas must.

    Returns:
      f32[B, K], rows that sum to 1 (0 where the mask is 0); no gradient passes.

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    chex.assert_type(scores, jnp.float32)
    rows, prototypes = scores.shape
    mask = jnp.ones((rows,), jnp.float32) if mask is None else mask
    chex.assert_shape(mask, (rows,))
    scaled = jax.lax.stop_gradient(scores) / epsilon
    plan = jnp.exp(scaled - highest(jnp.max(scaled))) * mask[:, None]
    count = total(jnp.sum(mask))
    plan = plan * _inverse(total(jnp.sum(plan)))
    for _ in range(iterations):
        by_prototype = total(jnp.sum(plan, axis=0, keepdims=True))
        plan = plan * _inverse(prototypes * by_prototype)
        by_row = jnp.sum(plan, axis=1, keepdims=True)
        plan = plan * _inverse(count * by_row)
    return plan * count


def _inverse(sums: Array) -> Array:
    """Returns 1 / sums, and 0 for a sum that is 0, as of a row that is not there.

    A factor rather than a divisor: XLA makes one division of several, by the product of their
    divisors, and that may underflow.
    """
    return jnp.where(sums > 0, 1 / jnp.where(sums > 0, sums, 1), 0)
