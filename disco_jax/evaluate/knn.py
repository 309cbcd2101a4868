"""k-nearest-neighbour classification, weighted as DINO does or by a plain vote as SEED does."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from disco_jax import errors
from disco_jax.evaluate.scores import top_k
from disco_jax.ops.losses import unit

VOTES = ("weighted", "majority")
SPARE = 8  # candidates beyond k that are compared again in float64
_RANKED_AT_ONCE = 64  # test rows


def neighbours(
    train: np.ndarray,
    test: np.ndarray,
    k: int,
    block: int = 1024,
    *,
    bank_block: int = 8192,
    resident: int = 262_144,
    leave_out: bool = False,
):
    """The k most similar training rows of every test row, by cosine.

    The bank is shared between the devices of all hosts. Neither it nor the similarities are ever
    whole on a device: `resident` rows of the bank are, and f32[block, bank_block] products.

    Args:
      train: f32[N, F], the same on every host.
      test: f32[M, F], likewise.
      k: neighbours, at most N (N - 1 with `leave_out`).
      block: test rows compared at once.
      bank_block: bank rows compared at once.
      resident: bank rows that a device holds at a time.
      leave_out: `test` is `train`, and no row is its own neighbour.

    Returns:
      f64[M, k] similarities, highest first, and their i64[M, k] rows in `train`; equal ones in
      the order of their rows. The candidates, k + 8 of them, are found in float32 and ordered in
      float64, so that neither blocks nor devices nor hosts change the result.

    Raises:
      UserError: when k is not between 1 and N.
    """
    most = len(train) - leave_out
    if not 1 <= k <= most:
        raise errors.UserError(f"config.k={k} must lie between 1 and the {most} images.")
    keep = min(k + SPARE, most)
    candidates = _candidates(train, test, keep, block, (bank_block, resident), leave_out)
    return _ranked(train, test, candidates, k)


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


def leave_one_out(rows: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Weighted-vote top-1 in percent of every row by the k nearest others.

    Needs no training images: SSLight watches its runs this way, within the validation split.

    Args:
      rows: f32[N, F].
      labels: i32[N].
      k: neighbours.
    """
    similarities, nearest = neighbours(rows, rows, k, leave_out=True)
    votes = scores(similarities, labels[nearest], int(labels.max()) + 1)
    return top_k(votes, labels, 1)


def _candidates(
    train: np.ndarray,
    test: np.ndarray,
    keep: int,
    block: int,
    blocks: tuple[int, int],
    leave_out: bool,
) -> np.ndarray:
    """i64[M, keep]: the rows of `train` with the highest similarities in float32."""
    host, hosts = jax.process_index(), jax.process_count()
    first, last = host * len(train) // hosts, (host + 1) * len(train) // hosts
    devices = jax.local_device_count()
    own_share = math.ceil((last - first) / devices)
    bank_block = min(blocks[0], max(own_share, keep))
    in_blocks = min(max(blocks[1] // bank_block, 1), max(math.ceil(own_share / bank_block), 1))
    per_device = in_blocks * bank_block
    block = min(block, len(test))
    values = np.full((len(test), keep), -np.inf, np.float32)
    rows = np.zeros((len(test), keep), np.int64)
    for start in range(first, last, per_device * devices):
        part = train[start : min(start + per_device * devices, last)]
        bank, count = _on_devices(part, per_device, devices)
        for i in range(0, len(test), block):
            chunk = test[i : i + block]
            padded = np.zeros((block, test.shape[1]), np.float32)
            padded[: len(chunk)] = chunk
            own = np.arange(i, i + block) - start if leave_out else np.full(block, -1)
            found = _nearest(bank, count, padded, own, keep, bank_block)
            merged = (values[i : i + block], rows[i : i + block])
            for value, row in zip(*jax.device_get(found), strict=True):  # a device at a time
                merged = _merged(merged, (value[: len(chunk)], row[: len(chunk)] + start), keep)
            values[i : i + block], rows[i : i + block] = merged
    if hosts > 1:
        gathered = multihost_utils.process_allgather((values, rows))
        values, rows = functools.reduce(
            lambda one, two: _merged(one, two, keep), zip(*gathered, strict=True)
        )
    return rows


def _on_devices(part: np.ndarray, per_device: int, devices: int) -> tuple[Array, np.ndarray]:
    """f32[devices, per_device, F] rows of length 1, and i32[devices] how many are real."""
    bank = np.zeros((devices * per_device, part.shape[1]), np.float32)
    bank[: len(part)] = part
    counts = np.clip(len(part) - per_device * np.arange(devices), 0, per_device)
    by_device = bank.reshape(devices, per_device, -1)
    return jax.pmap(unit)(by_device), counts.astype(np.int32)


def _merged(one, two, keep: int):
    """The `keep` best of two pairs (f32[M, a] similarities, i64[M, a] rows), best first."""
    values, rows = (np.concatenate(pair, axis=1) for pair in zip(one, two, strict=True))
    order = np.lexsort((rows, -values), axis=1)[:, :keep]
    return np.take_along_axis(values, order, 1), np.take_along_axis(rows, order, 1)


def _nearest(
    bank: Array, counts: np.ndarray, test: np.ndarray, own: np.ndarray, keep: int, bank_block: int
) -> tuple[Array, Array]:
    """f32[devices, m, keep] similarities and their i32 rows, counted from the bank's first."""
    per_device = bank.shape[1]
    starts = np.arange(len(bank), dtype=np.int32) * per_device
    return _scan(bank, counts, starts, test, own.astype(np.int32), keep, bank_block)


@functools.partial(
    jax.pmap, in_axes=(0, 0, 0, None, None, None, None), static_broadcasted_argnums=(5, 6)
)
def _scan(bank, count, start, test, own, keep, bank_block):
    """The best of one device's part of the bank, a block of it at a time."""
    test = unit(test)
    blocks = bank.reshape(-1, bank_block, bank.shape[-1])

    def step(best, block):
        rows, begin = block
        numbers = begin + jnp.arange(bank_block, dtype=jnp.int32)
        products = jnp.matmul(test, rows.T, precision=jax.lax.Precision.HIGHEST)
        hidden = (numbers >= count)[None, :] | ((numbers + start)[None, :] == own[:, None])
        products = jnp.where(hidden, -jnp.inf, products)
        values, places = jax.lax.top_k(products, min(keep, bank_block))
        values = jnp.concatenate([best[0], values], axis=1)
        rows = jnp.concatenate([best[1], numbers[places] + start], axis=1)
        values, places = jax.lax.top_k(values, keep)
        return (values, jnp.take_along_axis(rows, places, axis=1)), None

    empty = jnp.full((len(test), keep), -jnp.inf), jnp.zeros((len(test), keep), jnp.int32)
    begins = jnp.arange(len(blocks), dtype=jnp.int32) * bank_block
    return jax.lax.scan(step, empty, (blocks, begins))[0]


def _ranked(train: np.ndarray, test: np.ndarray, candidates: np.ndarray, k: int):
    """The k best of i64[M, keep] candidates by cosines in float64; ties by row number."""
    candidates = np.sort(candidates, axis=1)
    similarities = np.empty(candidates.shape)
    for i in range(0, len(test), _RANKED_AT_ONCE):
        some = slice(i, i + _RANKED_AT_ONCE)
        bank, rows = _unit64(train[candidates[some]]), _unit64(test[some])
        # Not a matrix product, which sums the last rows of a block in another order: equal rows
        # would have similarities that differ in the last bit.
        similarities[some] = np.sum(bank * rows[:, None], axis=-1)
    best = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarities, best, 1), np.take_along_axis(candidates, best, 1)


def _unit64(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
