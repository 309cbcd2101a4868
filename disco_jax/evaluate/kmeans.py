"""K-means by cosine, for as many rows as the host's memory holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from disco_jax import errors
from disco_jax.ops.losses import unit


def kmeans(
    rows: np.ndarray, count: int, *, iterations: int = 20, seed: int = 0, block: int = 8192
) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of rows by the direction they point in.

    Starts from different rows drawn evenly; in each iteration a centroid becomes the direction of
    the sum of its unit rows, and one without any the row that fits its own centroid worst.

    Args:
      rows: f32[N, D].
      count: of the clusters, at most N.
      iterations: at most; ends earlier when no row changes its cluster.
      seed: of the start.
      block: rows compared at once; f32[block, count] is all that is held on the device.

    Returns:
      f32[count, D] centroids, unit rows, and i32[N], the cluster of each row.

    Raises:
      UserError: when `count` is not between 1 and N.
    """
    if not 1 <= count <= len(rows):
        raise errors.UserError(
            f"config.clusters={count} must lie between 1 and the {len(rows)} images."
        )
    start = np.random.default_rng(seed).choice(len(rows), count, replace=False)
    centroids = np.asarray(unit(jnp.asarray(rows[np.sort(start)])))
    labels = np.full(len(rows), -1, np.int32)
    for _ in range(iterations):
        new, fit, sums = _pass(rows, centroids, block)
        if np.array_equal(new, labels):
            break
        labels = new
        empty = np.flatnonzero(np.bincount(labels, minlength=count) == 0)
        sums[empty] = rows[np.argsort(fit)[: len(empty)]]
        centroids = np.asarray(unit(jnp.asarray(sums)))
    return centroids, _pass(rows, centroids, block)[0]


def _pass(
    rows: np.ndarray, centroids: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """i32[N] nearest centroids, f32[N] cosines with them, f32[K, D] sums of the unit rows."""
    labels, fits, sums = [], [], np.zeros_like(centroids)
    bank = jnp.asarray(centroids)
    for i in range(0, len(rows), block):
        label, fit, total = _assign(jnp.asarray(rows[i : i + block]), bank, len(centroids))
        labels.append(np.asarray(label))
        fits.append(np.asarray(fit))
        sums += np.asarray(total)
    return np.concatenate(labels), np.concatenate(fits), sums


@functools.partial(jax.jit, static_argnums=2)
def _assign(rows: Array, centroids: Array, count: int) -> tuple[Array, Array, Array]:
    rows = unit(rows)
    scores = jnp.matmul(rows, centroids.T, precision=jax.lax.Precision.HIGHEST)
    labels = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return labels, jnp.max(scores, axis=-1), jax.ops.segment_sum(rows, labels, count)
