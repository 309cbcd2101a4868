"""k-nearest-neighbour classification, weighted as in DINO or by majority vote as in SEED."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from disco_jax import errors
from disco_jax.evaluate.scores import top_k
from disco_jax.ops.vectors import l2_normalize

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
    """Finds the k training rows with the highest cosine similarity to every test row.

    The bank of training rows is sharded over the devices of all hosts. A device holds `resident`
    rows of it and f32[block, bank_block] similarities at a time, never all of them.

    Args:
      train: f32[N, F], the same on every host.
      test: f32[M, F], the same on every host.
      k: number of neighbours, at most N (N - 1 with `leave_out`).
      block: test rows compared at once.
      bank_block: bank rows compared at once.
      resident: bank rows that a device holds at a time.
      leave_out: excludes each row from its own neighbours; `test` must be `train`.

    Returns:
      f64[M, k] similarities in descending order, and i64[M, k] indices into `train`; equal
      similarities are in index order. k + 8 candidates are found in float32 and sorted in float64,
      so the result does not depend on blocks, devices or hosts.

    Raises:
      UserError: if `k` is out of range.
    """
    max_k = len(train) - leave_out
    if not 1 <= k <= max_k:
        raise errors.UserError(
            f"config.k={k} must be between 1 and {max_k}, the number of images to compare with."
        )
    keep = min(k + SPARE, max_k)
    candidates = _candidates(train, test, keep, block, (bank_block, resident), leave_out)
    return _rank(train, test, candidates, k)


def scores(
    similarities: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    vote: str = "weighted",
    temperature: float = 0.07,
) -> np.ndarray:
    """Computes the votes of the neighbours for each class.

    Args:
      similarities: float[M, k] cosine similarities.
      labels: i32[M, k], labels of the neighbours.
      num_classes: C.
      vote: "weighted": each neighbour counts exp(similarity / temperature), as in DINO
        (arXiv:2104.14294); "majority": each counts 1, and ties go to the class with the higher sum
        of similarities.
      temperature: temperature of the weighted vote.

    Returns:
      f64[M, C].

    Raises:
      UserError: if `vote` is unknown.
    """
    if vote not in VOTES:
        raise errors.unknown("config.vote", vote, VOTES)
    similarities = similarities.astype(np.float64)
    if vote == "weighted":
        weights = np.exp(similarities / temperature)
    else:
        # The sum of k cosines divided by 4k is below 1/2 in size, so it can only break ties.
        weights = 1.0 + similarities / (4.0 * similarities.shape[1])
    votes = np.zeros((len(labels), num_classes))
    np.add.at(votes, (np.arange(len(labels))[:, None], labels), weights)
    return votes


def leave_one_out(rows: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Computes the weighted-vote top-1, in percent, of every row by its k nearest other rows.

    Needs no training images: SSLight monitors its runs this way within the validation split.

    Args:
      rows: f32[N, F].
      labels: i32[N].
      k: number of neighbours.
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
    """Returns i64[M, keep], the rows of `train` with the highest similarities in float32."""
    host, hosts = jax.process_index(), jax.process_count()
    first, last = host * len(train) // hosts, (host + 1) * len(train) // hosts
    devices = jax.local_device_count()
    rows_per_device = math.ceil((last - first) / devices)
    bank_block = min(blocks[0], max(rows_per_device, keep))
    num_blocks = min(
        max(blocks[1] // bank_block, 1), max(math.ceil(rows_per_device / bank_block), 1)
    )
    per_device = num_blocks * bank_block
    block = min(block, len(test))
    values = np.full((len(test), keep), -np.inf, np.float32)
    rows = np.zeros((len(test), keep), np.int64)
    for start in range(first, last, per_device * devices):
        shard = train[start : min(start + per_device * devices, last)]
        bank, count = _to_devices(shard, per_device, devices)
        for i in range(0, len(test), block):
            chunk = test[i : i + block]
            padded = np.zeros((block, test.shape[1]), np.float32)
            padded[: len(chunk)] = chunk
            excluded = np.arange(i, i + block) - start if leave_out else np.full(block, -1)
            device_results = _nearest(bank, count, padded, excluded, keep, bank_block)
            best = (values[i : i + block], rows[i : i + block])
            for value, row in zip(*jax.device_get(device_results), strict=True):  # per device
                best = _merge(best, (value[: len(chunk)], row[: len(chunk)] + start), keep)
            values[i : i + block], rows[i : i + block] = best
    if hosts > 1:
        gathered = multihost_utils.process_allgather((values, rows))
        values, rows = functools.reduce(
            lambda a, b: _merge(a, b, keep), zip(*gathered, strict=True)
        )
    return rows


def _to_devices(part: np.ndarray, per_device: int, devices: int) -> tuple[Array, np.ndarray]:
    """Returns f32[devices, per_device, F] normalized rows and i32[devices] counts of them."""
    bank = np.zeros((devices * per_device, part.shape[1]), np.float32)
    bank[: len(part)] = part
    counts = np.clip(len(part) - per_device * np.arange(devices), 0, per_device)
    by_device = bank.reshape(devices, per_device, -1)
    return jax.pmap(l2_normalize)(by_device), counts.astype(np.int32)


def _merge(a, b, keep: int):
    """Merges two pairs (f32[M, a] similarities, i64[M, a] rows); keeps the `keep` best, sorted."""
    values, rows = (np.concatenate(pair, axis=1) for pair in zip(a, b, strict=True))
    order = np.lexsort((rows, -values), axis=1)[:, :keep]
    return np.take_along_axis(values, order, 1), np.take_along_axis(rows, order, 1)


def _nearest(
    bank: Array,
    counts: np.ndarray,
    test: np.ndarray,
    excluded: np.ndarray,
    keep: int,
    bank_block: int,
) -> tuple[Array, Array]:
    """Returns f32[devices, m, keep] similarities and their i32 row indices in the bank."""
    per_device = bank.shape[1]
    starts = np.arange(len(bank), dtype=np.int32) * per_device
    return _scan(bank, counts, starts, test, excluded.astype(np.int32), keep, bank_block)


@functools.partial(
    jax.pmap, in_axes=(0, 0, 0, None, None, None, None), static_broadcasted_argnums=(5, 6)
)
def _scan(bank, count, start, test, excluded, keep, bank_block):
    """Returns the nearest rows in one device's shard of the bank, scanned block by block."""
    test = l2_normalize(test)
    blocks = bank.reshape(-1, bank_block, bank.shape[-1])

    def step(best, block):
        rows, first = block
        numbers = first + jnp.arange(bank_block, dtype=jnp.int32)
        products = jnp.matmul(test, rows.T, precision=jax.lax.Precision.HIGHEST)
        hidden = (numbers >= count)[None, :] | ((numbers + start)[None, :] == excluded[:, None])
        products = jnp.where(hidden, -jnp.inf, products)
        values, indices = jax.lax.top_k(products, min(keep, bank_block))
        values = jnp.concatenate([best[0], values], axis=1)
        rows = jnp.concatenate([best[1], numbers[indices] + start], axis=1)
        values, indices = jax.lax.top_k(values, keep)
        return (values, jnp.take_along_axis(rows, indices, axis=1)), None

    empty = jnp.full((len(test), keep), -jnp.inf), jnp.zeros((len(test), keep), jnp.int32)
    begins = jnp.arange(len(blocks), dtype=jnp.int32) * bank_block
    return jax.lax.scan(step, empty, (blocks, begins))[0]


def _rank(train: np.ndarray, test: np.ndarray, candidates: np.ndarray, k: int):
    """Sorts i64[M, keep] candidates by float64 cosines, ties by row index; returns the k best."""
    candidates = np.sort(candidates, axis=1)
    similarities = np.empty(candidates.shape)
    for i in range(0, len(test), _RANKED_AT_ONCE):
        some = slice(i, i + _RANKED_AT_ONCE)
        bank, rows = _l2_normalize64(train[candidates[some]]), _l2_normalize64(test[some])
        # A matrix product would sum the last rows of a block in another order, so that the
        # similarities of equal rows would differ in the last bit.
        similarities[some] = np.sum(bank * rows[:, None], axis=-1)
    best = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarities, best, 1), np.take_along_axis(candidates, best, 1)


def _l2_normalize64(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
