"""Similarities to a bank of rows, in one pass over it: what contrasts and attention read.

A softmax over a queue needs no array of its size. Rows of length 1 have no product above 1, so
that e^((q.n - 1) / tau) can neither overflow nor, for temperatures down to `COLDEST`, vanish: no
maximum is looked for first, and one pass gives the sum and the mean row, which is the gradient.
Such sums add up over the parts of a bank, too: where replicas share one, each makes the sums of
everyone's rows over its own part, and all that crosses between them is of the size of the rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.ops.collectives import gather, highest, positions, scatter, share

# e^(-2 / tau), of two opposite rows, must be a normal float32.
COLDEST = 1 / 40
# Rows of the bank that a CPU reads at once; they and their products stay in its cache.
BLOCK = 4096
# Up to so many rows a CPU is faster with the bank's rows first in the products (`_lines`).
FEW = 32
# Rows of the bank whose products with such few rows make one line.
_LINE = 64
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a bank is read; every way has the same result up to rounding.

    Attributes:
      one_pass: whether sum and gradient come from one pass over the bank, block by block on CPUs;
        else the products with the whole bank are kept for the gradient.
      dtype: of the factors of a student's products, float32 or bfloat16; sums are float32.
    """

    one_pass: bool = True
    dtype: Any = jnp.float32


USUAL = Reading()


class Compared(NamedTuple):
    """Rows beside a bank.

    Attributes:
      total: f32[B], log sum_j e^{q_i.n_j / tau}.
      nearest: f32[B], max_j q_i.n_j, without a gradient.
    """

    total: Array
    nearest: Array


def compared(
    rows: Array,
    bank: Array,
    *,
    temperature: float,
    reading: Reading = USUAL,
    shared: bool = False,
) -> Compared:
    """The part of a softmax's denominator that a bank makes up, and the nearest row of it.

    Args:
      rows: f32[B, D], unit rows; the only input that gets a gradient.
      bank: f32 or bf16[K, D], unit rows.
      temperature: tau > 0. Below `COLDEST` the bank is read as without `one_pass`.
      reading: how.
      shared: whether `bank` is this replica's part of the bank, the parts being as long as one
        another.

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    _check(rows, bank)
    bank = jax.lax.stop_gradient(bank)
    if reading.one_pass and temperature >= COLDEST:
        return _compared(rows, bank, temperature, jnp.dtype(reading.dtype).name, shared)
    products = _products(gather(rows) if shared else rows, bank, reading.dtype)
    nearest = jax.lax.stop_gradient(jnp.max(products, axis=-1))
    if not shared:
        return Compared(jax.nn.logsumexp(products / temperature, axis=-1), nearest)
    nearest = highest(nearest)
    weights = jnp.exp((products - nearest[:, None]) / temperature)
    total = jnp.log(scatter(jnp.sum(weights, axis=-1)))
    nearest = share(nearest)
    return Compared(total + nearest / temperature, nearest)


def compared_together(
    rows: Mapping[int, Array],
    bank: Array,
    *,
    temperature: float,
    reading: Reading = USUAL,
    shared: bool = False,
) -> dict[int, Compared]:
    """`compared` of several batches, for which the bank is read once.

    Args:
      rows: name -> f32[B, D], unit rows; B is the same for all.
      bank, temperature, reading, shared: see `compared`.
    """
    together = jnp.concatenate(list(rows.values()))
    found = compared(together, bank, temperature=temperature, reading=reading, shared=shared)
    split = [jnp.split(part, len(rows)) for part in found]
    return {name: Compared(*parts) for name, *parts in zip(rows, *split, strict=True)}


def attended(rows: Array, bank: Array, *, temperature: float, shared: bool = False) -> Array:
    """What rows read of themselves and a bank by attention: sum_j p_ij d_j.

    p_i is the softmax of r_i.d_j / tau over d = [r_i, n_1, ..., n_K]. No row is closer to r_i than
    itself, so that its own product is the shift of the exponent, at any temperature.

    Args:
      rows: f32[B, D], unit rows.
      bank: f32[K, D], unit rows.
      temperature: tau > 0. Products are float32: 1e-4 leaves no digit of bfloat16's.
      shared: see `compared`.

    Returns:
      f32[B, D]; no gradient passes.

    Raises:
      AssertionError: while tracing, when a shape or dtype above does not hold.
    """
    _check(rows, bank)
    chex.assert_type(bank, jnp.float32)
    rows, bank = jax.lax.stop_gradient((rows, bank))
    scaled = rows / temperature
    own = jnp.sum(scaled * rows, axis=-1)
    # The mean of rows is not divided by the temperature: three products of bfloat16 are enough.
    sums = _read(scaled, bank, own, jnp.float32, jax.lax.Precision.HIGH, shared)
    return (sums.rows + rows) / (sums.weight + 1)[:, None]


def closest(rows: Array, bank: Array, *, shared: bool = False) -> Array:
    """i32[B]: which row of a bank has the largest product with each row; the first of several.

    Args:
      rows: f32[B, D].
      bank: f32 or bf16[K, D].
      shared: see `compared`. Rows of the bank then count in the order of the replicas.
    """
    products = (gather(rows) if shared else rows) @ bank.T
    best = jnp.argmax(products, axis=-1)
    if not shared:
        return best
    most = jnp.take_along_axis(products, best[:, None], axis=-1)[:, 0]
    # Compared once, where all are: a maximum that is compared with its own copies asks for equality
    # of numbers that each replica may have computed twice.
    each, numbers = gather(most[None]), gather(positions(len(bank))[best][None])
    winner = jnp.argmax(each, axis=0)[None]
    return share(jnp.take_along_axis(numbers, winner, axis=0)[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _compared(rows: Array, bank: Array, temperature: float, dtype: str, shared: bool) -> Compared:
    return _forward(rows, bank, temperature, dtype, shared)[0]


def _forward(
    rows: Array, bank: Array, temperature: float, dtype: str, shared: bool
) -> tuple[Compared, Array]:
    """And the gradient of the total by the rows, f32[B, D]."""
    most = jnp.full(len(rows), 1 / temperature)
    mixing = _HIGHEST if dtype == "float32" else None
    sums = _read(rows / temperature, bank, most, jnp.dtype(dtype), mixing, shared)
    gradient = sums.rows / (sums.weight[:, None] * temperature)
    return Compared(jnp.log(sums.weight) + most, sums.highest * temperature), gradient


def _backward(temperature: float, dtype: str, shared: bool, gradient: Array, given: Compared):
    return given.total[:, None] * gradient, None


_compared.defvjp(_forward, _backward)


class _Sums(NamedTuple):
    """Over a bank: f32[B] sum_j w_ij, f32[B, D] sum_j w_ij n_j and f32[B] max_j r_i.n_j."""

    weight: Array
    rows: Array
    highest: Array


def _read(rows: Array, bank: Array, shift: Array, dtype, mixing, shared: bool) -> _Sums:
    """`_Sums` with w_ij = e^(r_i.n_j - shift_i), `mixing` the precision of their mean row."""
    if not shared:
        return _read_here(rows, bank, shift, dtype, mixing)
    sums = _read_here(gather(rows), bank, gather(shift), dtype, mixing)
    return _Sums(scatter(sums.weight), scatter(sums.rows), share(highest(sums.highest)))


def _read_here(rows: Array, bank: Array, shift: Array, dtype, mixing) -> _Sums:
    """See `_read`, over this replica's part of a bank that is shared."""
    one = functools.partial(_block, rows, shift=shift, dtype=dtype, mixing=mixing)

    def by_blocks(bank: Array) -> _Sums:
        if len(rows) > FEW:
            return _by_blocks(one, one, bank)
        line = jax.lax.optimization_barrier(jnp.tile(shift, _LINE))
        few = functools.partial(_lines, rows, shift=line, dtype=dtype, mixing=mixing)
        return _by_blocks(one, few, bank)

    return jax.lax.platform_dependent(bank, cpu=by_blocks, default=one)


def _block(rows: Array, bank: Array, *, shift, dtype, mixing) -> _Sums:
    """See `_read`, all of `bank` at once."""
    products = _products(rows, bank, dtype)
    weights = jnp.exp(products - shift[:, None])
    mixed = _mixed(weights, bank, dtype, mixing)
    return _Sums(jnp.sum(weights, axis=-1), mixed, jnp.max(products, axis=-1))


def _lines(rows: Array, bank: Array, *, shift: Array, dtype, mixing) -> _Sums:
    """`_block` of few rows and a multiple of `_LINE` rows of the bank, the bank's rows first.

    Exponentials and sums then run over lines of `_LINE` x B numbers instead of ends of B, across
    which a CPU's compiler adds one by one. The barriers keep it from fusing them with the products
    and from taking each exponential twice.

    Args:
      shift: f32[_LINE * B], the shift of each row again and again.
    """
    products = _products(bank, rows, dtype)
    lines = jax.lax.optimization_barrier(products).reshape(-1, len(shift))
    weights = jax.lax.optimization_barrier(jnp.exp(lines - shift[None]))
    mixed = _mixed(weights.reshape(products.shape).T, bank, dtype, mixing)

    def by_row(over: Callable[..., Array], lines: Array) -> Array:
        return over(over(lines, axis=0).reshape(_LINE, -1), axis=0)

    return _Sums(by_row(jnp.sum, weights), mixed, by_row(jnp.max, lines))


def _mixed(weights: Array, bank: Array, dtype, precision) -> Array:
    """f32[B, D], sums of the bank's rows by f32[B, K]."""
    return jnp.matmul(
        weights.astype(dtype), bank.astype(dtype), precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _by_blocks(one: Callable[[Array], _Sums], full: Callable[[Array], _Sums], bank: Array) -> _Sums:
    """`full` of each full block of the bank and `one` of what they leave over, summed."""
    rest = len(bank) % BLOCK
    first = rest or BLOCK

    def further(sums: _Sums, start: Array) -> tuple[_Sums, None]:
        block = full(jax.lax.dynamic_slice_in_dim(bank, start, BLOCK))
        highest = jnp.maximum(sums.highest, block.highest)
        return _Sums(sums.weight + block.weight, sums.rows + block.rows, highest), None

    begin = (one if rest else full)(bank[:first])
    if first == len(bank):
        return begin
    return jax.lax.scan(further, begin, jnp.arange(first, len(bank), BLOCK))[0]


def _products(rows: Array, bank: Array, dtype) -> Array:
    """f32[B, K]. They are divided by temperatures: float32 ones must be exact everywhere."""
    return jnp.matmul(
        rows.astype(dtype),
        bank.T.astype(dtype),
        precision=_HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _check(rows: Array, bank: Array) -> None:
    chex.assert_type(rows, jnp.float32)
    chex.assert_shape(bank, (None, rows.shape[-1]))
    assert bank.dtype in (jnp.float32, jnp.bfloat16), bank.dtype
