"""Similarities between rows and a queue of embeddings, computed in one pass over the queue.

A softmax over a queue needs no array of the queue's size. The product of two unit rows is at most
1, so e^((q.n - 1) / tau) cannot overflow and, for temperatures of at least `MIN_TEMPERATURE`,
cannot vanish. No maximum has to be subtracted first, and one pass computes both the sum and the
weighted mean row, which is the gradient. The sums are additive over shards of a queue: where
replicas shard it, each replica sums over its own shard for the rows of all replicas, and only
arrays of the size of the rows are communicated.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.ops.collectives import gather, local_slice, pmax, positions, psum_scatter

# The lowest temperature of the one-pass sums: e^(-2 / tau), the term of two opposite rows, must be
# a normal float32.
MIN_TEMPERATURE = 1 / 40
# Queue rows that a CPU processes at once. A block and its products fit in the cache.
BLOCK = 4096
# Up to this batch size, products of shape [queue, batch] are faster on CPUs (`_sum_lines`).
SMALL_BATCH = 32
# Queue rows whose products with such a small batch form one line of the reduction.
_LINE = 64
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class QueueAccess:
    """Settings of the computation over a queue. Results are equal up to rounding for all of them.

    Attributes:
      one_pass: compute sum and gradient in one pass over the queue, block by block on CPUs. If
        False, the products with the whole queue are stored for the gradient.
      dtype: of the factors of the student's products, float32 or bfloat16; sums are float32.
    """

    one_pass: bool = True
    dtype: Any = jnp.float32


DEFAULT_ACCESS = QueueAccess()


class QueueLogSumExp(NamedTuple):
    """Similarities of a batch of rows q_i to the rows n_j of a queue.

    Attributes:
      total: f32[B], log sum_j e^{q_i.n_j / tau}.
      nearest: f32[B], max_j q_i.n_j, without a gradient.
    """

    total: Array
    nearest: Array


def queue_logsumexp(
    rows: Array,
    queue: Array,
    *,
    temperature: float,
    reading: QueueAccess = DEFAULT_ACCESS,
    shared: bool = False,
) -> QueueLogSumExp:
    """Computes the log-sum-exp of similarities to a queue, and the largest similarity.

    Args:
      rows: f32[B, D], unit rows; the only input that receives a gradient.
      queue: f32 or bf16[K, D], unit rows.
      temperature: tau > 0. Below `MIN_TEMPERATURE`, `reading.one_pass` is ignored and products are
        stored.
      reading: settings of the computation.
      shared: whether `queue` is this replica's shard. All shards have equally many rows.

    Returns:
      `QueueLogSumExp`, over the rows of all shards.

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    _check(rows, queue)
    queue = jax.lax.stop_gradient(queue)
    if reading.one_pass and temperature >= MIN_TEMPERATURE:
        return _one_pass(rows, queue, temperature, jnp.dtype(reading.dtype).name, shared)
    products = _products(gather(rows) if shared else rows, queue, reading.dtype)
    nearest = jax.lax.stop_gradient(jnp.max(products, axis=-1))
    if not shared:
        return QueueLogSumExp(jax.nn.logsumexp(products / temperature, axis=-1), nearest)
    nearest = pmax(nearest)
    weights = jnp.exp((products - nearest[:, None]) / temperature)
    log_sum = jnp.log(psum_scatter(jnp.sum(weights, axis=-1)))
    nearest = local_slice(nearest)
    return QueueLogSumExp(log_sum + nearest / temperature, nearest)


def queue_logsumexp_of_each(
    rows: Mapping[int, Array],
    queue: Array,
    *,
    temperature: float,
    reading: QueueAccess = DEFAULT_ACCESS,
    shared: bool = False,
) -> dict[int, QueueLogSumExp]:
    """Applies `queue_logsumexp` to several batches in one pass over the queue.

    Args:
      rows: name -> f32[B, D], unit rows; B is the same for all names.
      queue, temperature, reading, shared: see `queue_logsumexp`.

    Returns:
      name -> `QueueLogSumExp` of its batch.
    """
    batches = jnp.concatenate(list(rows.values()))
    similarities = queue_logsumexp(
        batches, queue, temperature=temperature, reading=reading, shared=shared
    )
    split = [jnp.split(part, len(rows)) for part in similarities]
    return {name: QueueLogSumExp(*parts) for name, *parts in zip(rows, *split, strict=True)}


def queue_attention(
    rows: Array, queue: Array, *, temperature: float, shared: bool = False
) -> Array:
    """Computes attention of each row over itself and a queue: sum_j p_ij d_j.

    p_i is the softmax of r_i.d_j / tau over d = [r_i, n_1, ..., n_K]. A row's product with itself
    is the largest, so it is subtracted in the exponent at any temperature.

    Args:
      rows: f32[B, D], unit rows.
      queue: f32[K, D], unit rows.
      temperature: tau > 0. Products are float32: at 1e-4, bfloat16 would leave no correct digit.
      shared: see `queue_logsumexp`.

    Returns:
      f32[B, D], without a gradient.

    Raises:
      AssertionError: while tracing, if a shape or dtype differs from those above.
    """
    _check(rows, queue)
    chex.assert_type(queue, jnp.float32)
    rows, queue = jax.lax.stop_gradient((rows, queue))
    scaled = rows / temperature
    own = jnp.sum(scaled * rows, axis=-1)
    # The weighted mean is not divided by the temperature: three bfloat16 products are enough.
    sums = _sum(scaled, queue, own, jnp.float32, jax.lax.Precision.HIGH, shared)
    return (sums.rows + rows) / (sums.weight + 1)[:, None]


def nearest(rows: Array, queue: Array, *, shared: bool = False) -> Array:
    """Returns the index of the queue row with the largest product with each row, i32[B].

    Ties resolve to the lowest index.

    Args:
      rows: f32[B, D].
      queue: f32 or bf16[K, D].
      shared: see `queue_logsumexp`. Indices then number the rows of all shards in the order of
        replicas.
    """
    products = (gather(rows) if shared else rows) @ queue.T
    best = jnp.argmax(products, axis=-1)
    if not shared:
        return best
    most = jnp.take_along_axis(products, best[:, None], axis=-1)[:, 0]
    # The argmax runs once on the gathered maxima. Comparing a pmax with the local maximum instead
    # would test floats for equality that each replica may have rounded differently.
    maxima, indices = gather(most[None]), gather(positions(len(queue))[best][None])
    winner = jnp.argmax(maxima, axis=0)[None]
    return local_slice(jnp.take_along_axis(indices, winner, axis=0)[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _one_pass(
    rows: Array, queue: Array, temperature: float, dtype: str, shared: bool
) -> QueueLogSumExp:
    return _forward(rows, queue, temperature, dtype, shared)[0]


def _forward(
    rows: Array, queue: Array, temperature: float, dtype: str, shared: bool
) -> tuple[QueueLogSumExp, Array]:
    """Returns `QueueLogSumExp` and the gradient of `total` with respect to the rows, f32[B, D]."""
    most = jnp.full(len(rows), 1 / temperature)
    precision = _HIGHEST if dtype == "float32" else None
    sums = _sum(rows / temperature, queue, most, jnp.dtype(dtype), precision, shared)
    gradient = sums.rows / (sums.weight[:, None] * temperature)
    return QueueLogSumExp(jnp.log(sums.weight) + most, sums.largest * temperature), gradient


def _backward(
    temperature: float, dtype: str, shared: bool, gradient: Array, cotangent: QueueLogSumExp
):
    return cotangent.total[:, None] * gradient, None


_one_pass.defvjp(_forward, _backward)


class _Sums(NamedTuple):
    """Sums over a queue: f32[B] sum_j w_ij, f32[B, D] sum_j w_ij n_j and f32[B] max_j r_i.n_j."""

    weight: Array
    rows: Array
    largest: Array


def _sum(rows: Array, queue: Array, shift: Array, dtype, precision, shared: bool) -> _Sums:
    """Computes `_Sums` with w_ij = e^(r_i.n_j - shift_i) over the whole queue.

    Args:
      rows: f32[B, D], r.
      queue: [K, D], n.
      shift: f32[B].
      dtype: of the factors of both matrix products.
      precision: of the weighted sum of queue rows.
      shared: see `queue_logsumexp`.
    """
    if not shared:
        return _sum_local(rows, queue, shift, dtype, precision)
    sums = _sum_local(gather(rows), queue, gather(shift), dtype, precision)
    return _Sums(
        psum_scatter(sums.weight), psum_scatter(sums.rows), local_slice(pmax(sums.largest))
    )


def _sum_local(rows: Array, queue: Array, shift: Array, dtype, precision) -> _Sums:
    """Computes `_sum` over the rows that this replica stores."""
    block = functools.partial(_sum_block, rows, shift=shift, dtype=dtype, precision=precision)

    def by_blocks(queue: Array) -> _Sums:
        if len(rows) > SMALL_BATCH:
            return _sum_by_blocks(block, block, queue)
        line = jax.lax.optimization_barrier(jnp.tile(shift, _LINE))
        lines = functools.partial(_sum_lines, rows, shift=line, dtype=dtype, precision=precision)
        return _sum_by_blocks(block, lines, queue)

    return jax.lax.platform_dependent(queue, cpu=by_blocks, default=block)


def _sum_block(rows: Array, queue: Array, *, shift, dtype, precision) -> _Sums:
    """Computes `_sum` over all of `queue` at once."""
    products = _products(rows, queue, dtype)
    weights = jnp.exp(products - shift[:, None])
    weighted = _weighted_rows(weights, queue, dtype, precision)
    return _Sums(jnp.sum(weights, axis=-1), weighted, jnp.max(products, axis=-1))


def _sum_lines(rows: Array, queue: Array, *, shift: Array, dtype, precision) -> _Sums:
    """Computes `_sum_block` for a small batch, with products of shape [queue, batch].

    Exponentials and sums then run over lines of `_LINE` x B numbers. Over rows of only B numbers, a
    CPU's compiler adds one by one. The barriers stop the compiler from fusing the exponentials with
    the products and from computing each exponential twice.

    Args:
      rows: f32[B, D].
      queue: [K, D], K a multiple of `_LINE`.
      shift: f32[_LINE * B], the shifts of the B rows repeated `_LINE` times.
      dtype, precision: see `_sum`.
    """
    products = _products(queue, rows, dtype)
    lines = jax.lax.optimization_barrier(products).reshape(-1, len(shift))
    weights = jax.lax.optimization_barrier(jnp.exp(lines - shift[None]))
    weighted = _weighted_rows(weights.reshape(products.shape).T, queue, dtype, precision)

    def reduce(over: Callable[..., Array], lines: Array) -> Array:
        return over(over(lines, axis=0).reshape(_LINE, -1), axis=0)

    return _Sums(reduce(jnp.sum, weights), weighted, reduce(jnp.max, lines))


def _weighted_rows(weights: Array, queue: Array, dtype, precision) -> Array:
    """Returns f32[B, D], the sums of queue rows with weights f32[B, K]."""
    return jnp.matmul(
        weights.astype(dtype), queue.astype(dtype), precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _sum_by_blocks(
    partial: Callable[[Array], _Sums], full: Callable[[Array], _Sums], queue: Array
) -> _Sums:
    """Sums `full` over the queue's full blocks and `partial` over the remaining rows."""
    rest = len(queue) % BLOCK
    first = rest or BLOCK

    def add_block(sums: _Sums, start: Array) -> tuple[_Sums, None]:
        block = full(jax.lax.dynamic_slice_in_dim(queue, start, BLOCK))
        largest = jnp.maximum(sums.largest, block.largest)
        return _Sums(sums.weight + block.weight, sums.rows + block.rows, largest), None

    initial = (partial if rest else full)(queue[:first])
    if first == len(queue):
        return initial
    return jax.lax.scan(add_block, initial, jnp.arange(first, len(queue), BLOCK))[0]


def _products(rows: Array, queue: Array, dtype) -> Array:
    """Returns f32[B, K]. float32 products must be exact: they are divided by temperatures."""
    return jnp.matmul(
        rows.astype(dtype),
        queue.T.astype(dtype),
        precision=_HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _check(rows: Array, queue: Array) -> None:
    chex.assert_type(rows, jnp.float32)
    chex.assert_shape(queue, (None, rows.shape[-1]))
    assert queue.dtype in (jnp.float32, jnp.bfloat16), queue.dtype
