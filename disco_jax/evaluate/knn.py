"""k-nearest-neighbour classification, weighted as DINO does or by a plain vote as SEED does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from disco_jax import errors
from disco_jax.ops.losses import unit

VOTES = ("weighted", "majority")
SPARE = 8  # candidates beyond k that are compared again in float64


def neighbours(train: np.ndarray, test: np.ndarray, k: int, block: int = 1024):
    """The k most similar training rows of every test row, by cosine.

    Args:
      train: f32[N, F].
      test: f32[M, F].
      k: neighbours, at most N.
      block: test rows compared at once; f32[block, N] is all that is held.

    Returns:
      f64[M, k] similarities, highest first, and their i32[M, k] rows in `train`; equal ones in
      the order of their rows.

    Raises:
      UserError: when k is not between 1 and N.
    """
    if not 1 <= k <= len(train):
        raise errors.UserError(f"config.k={k} must lie between 1 and the {len(train)} images.")
    bank, found = unit(jnp.asarray(train)), []
    for i in range(0, len(test), block):
        rows = test[i : i + block]
        # A few more than asked for: float32 may order near ties otherwise than float64 does.
        candidates = _nearest(bank, jnp.asarray(rows), min(k + SPARE, len(train)))
        found.append(_ranked(train, rows, np.asarray(candidates), k))
    similarities, rows = zip(*found, strict=True)
    return np.concatenate(similarities), np.concatenate(rows)


def scores(
    similarities: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    vote: str = "weighted",
    temperature: float = 0.07,
) -> np.ndarray:
    """The votes of the neighbours for each class.

    Args:
      similarities: float[M, k] cosines.
      labels: i32[M, k], the neighbours' labels.
      num_classes: C.
      vote: "weighted": exp(similarity / temperature) a neighbour, as DINO (arXiv:2104.14294)
        counts; "majority": 1 a neighbour, ties to the class with the higher sum of similarities.
      temperature: of "weighted".

    Returns:
      f64[M, C].

    Raises:
      UserError: for a vote that is not known.
    """
    if vote not in VOTES:
        raise errors.unknown("config.vote", vote, VOTES)
    similarities = similarities.astype(np.float64)
    if vote == "weighted":
        weights = np.exp(similarities / temperature)
    else:
        # A sum of k cosines is below 2k in size: it orders ties and nothing else.
        weights = 1.0 + similarities / (4.0 * similarities.shape[1])
    votes = np.zeros((len(labels), num_classes))
    np.add.at(votes, (np.arange(len(labels))[:, None], labels), weights)
    return votes


@functools.partial(jax.jit, static_argnames="k")
def _nearest(bank: Array, test: Array, k: int) -> Array:
    products = jnp.matmul(unit(test), bank.T, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(products, k)[1]


def _ranked(train: np.ndarray, test: np.ndarray, candidates: np.ndarray, k: int):
    """The k best of i32[M, k + spare] candidates by cosines in float64; ties by row number."""
    candidates = np.sort(candidates, axis=1)
    similarities = np.empty(candidates.shape)
    for i, rows in enumerate(candidates):
        similarities[i] = _unit64(train[rows]) @ _unit64(test[i])
    best = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarities, best, 1), np.take_along_axis(candidates, best, 1)


def _unit64(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
