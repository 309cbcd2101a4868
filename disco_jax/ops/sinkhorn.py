"""Balanced assignment of embeddings to prototypes, computed over the global batch."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.ops.collectives import pmax, psum


def sinkhorn(scores: Array, *, epsilon: float, iterations: int, mask: Array | None = None) -> Array:
    """Computes soft assignments that use every prototype equally, by the Sinkhorn-Knopp algorithm.

    SwAV (arXiv:2006.09882) eq. 3 to 5: Q = diag(u) exp(C^T Z / epsilon) diag(v). Each of
    `iterations` rounds scales every prototype's sum over the global batch to 1/K, then every
    example's sum to 1/B. Examples are scaled last, so rows sum to 1 exactly, and prototypes are
    balanced up to the convergence of the rounds.

    The largest score is subtracted first so that exp cannot overflow; the normalisation cancels it.
    Sums run over all replicas, so the result does not depend on the number of replicas.

    Args:
      scores: f32[B, K], scores of this replica's rows on the prototypes.
      epsilon: > 0, weight of the entropy; 0.05 in SwAV. Smaller values give harder assignments.
      iterations: number of rounds, at least 1; 3 in SwAV.
      mask: f32[B], 1 for valid rows and 0 for rows to ignore; None if all are valid. At least one
        row over all replicas must be valid.

    Returns:
      f32[B, K], rows that sum to 1 (0 where the mask is 0), without a gradient.

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    chex.assert_type(scores, jnp.float32)
    rows, prototypes = scores.shape
    mask = jnp.ones((rows,), jnp.float32) if mask is None else mask
    chex.assert_shape(mask, (rows,))
    scaled = jax.lax.stop_gradient(scores) / epsilon
    plan = jnp.exp(scaled - pmax(jnp.max(scaled))) * mask[:, None]
    count = psum(jnp.sum(mask))
    plan = plan * _inverse(psum(jnp.sum(plan)))
    for _ in range(iterations):
        by_prototype = psum(jnp.sum(plan, axis=0, keepdims=True))
        plan = plan * _inverse(prototypes * by_prototype)
        by_row = jnp.sum(plan, axis=1, keepdims=True)
        plan = plan * _inverse(count * by_row)
    return plan * count


def _inverse(sums: Array) -> Array:
    """Returns 1 / sums, and 0 where a sum is 0, as for masked rows.

    The caller multiplies by it instead of dividing: XLA merges successive divisions into one by the
    product of the divisors, which may underflow.
    """
    return jnp.where(sums > 0, 1 / jnp.where(sums > 0, sums, 1), 0)
