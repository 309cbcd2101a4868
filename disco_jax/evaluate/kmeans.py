"""Spherical k-means for all rows that fit into the host's memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from disco_jax import errors
from disco_jax.ops.vectors import l2_normalize


def kmeans(
    rows: np.ndarray, count: int, *, iterations: int = 20, seed: int = 0, block: int = 8192
) -> tuple[np.ndarray, np.ndarray]:
    """Clusters rows by direction (spherical k-means).

    The initial centroids are distinct rows drawn uniformly. Each iteration sets a centroid to the
    direction of the sum of its L2-normalized rows; an empty cluster gets the row with the lowest
    similarity to its own centroid.

    Args:
      rows: f32[N, D].
      count: number of clusters, at most N.
      iterations: maximum number of iterations; stops earlier when no row changes its cluster.
      seed: seed of the initial centroids.
      block: rows compared at once; the device holds f32[block, count] similarities.

    Returns:
      f32[count, D] L2-normalized centroids, and i32[N], the cluster of each row.

    Raises:
      UserError: if `count` is not between 1 and N.
    """
    if not 1 <= count <= len(rows):
        raise errors.UserError(
            f"config.clusters={count} must be between 1 and the number of images, {len(rows)}."
        )
    start = np.random.default_rng(seed).choice(len(rows), count, replace=False)
    centroids = np.asarray(l2_normalize(jnp.asarray(rows[np.sort(start)])))
    labels = np.full(len(rows), -1, np.int32)
    for _ in range(iterations):
        new, fit, sums = _pass(rows, centroids, block)
        if np.array_equal(new, labels):
            break
        labels = new
        empty = np.flatnonzero(np.bincount(labels, minlength=count) == 0)
        sums[empty] = rows[np.argsort(fit)[: len(empty)]]
        centroids = np.asarray(l2_normalize(jnp.asarray(sums)))
    return centroids, _pass(rows, centroids, block)[0]


def _pass(
    rows: np.ndarray, centroids: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns i32[N] nearest centroids, f32[N] their cosines, f32[K, D] sums of normalized rows."""
    labels, fits, sums = [], [], np.zeros_like(centroids)
    on_device = jnp.asarray(centroids)
    for i in range(0, len(rows), block):
        label, fit, partial_sums = _assign(
            jnp.asarray(rows[i : i + block]), on_device, len(centroids)
        )
        labels.append(np.asarray(label))
        fits.append(np.asarray(fit))
        sums += np.asarray(partial_sums)
    return np.concatenate(labels), np.concatenate(fits), sums


@functools.partial(jax.jit, static_argnums=2)
def _assign(rows: Array, centroids: Array, count: int) -> tuple[Array, Array, Array]:
    rows = l2_normalize(rows)
    scores = jnp.matmul(rows, centroids.T, precision=jax.lax.Precision.HIGHEST)
    labels = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return labels, jnp.max(scores, axis=-1), jax.ops.segment_sum(rows, labels, count)
