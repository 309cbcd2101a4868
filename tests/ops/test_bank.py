"""Queues read in one pass: the same numbers as the formulas, and no array of a queue's size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax.ops.bank import (
    BLOCK,
    COLDEST,
    FEW,
    Reading,
    attended,
    closest,
    compared,
    compared_together,
)
from disco_jax.ops.collectives import AXIS
from disco_jax.ops.losses import info_nce, soft_cross_entropy, unit

B, D = 8, 32
EXACT, HALF = 1e-5, 1e-3  # relative, of float32 and of bfloat16 factors
FORMULA = Reading(one_pass=False)
# Some that a CPU multiplies from the right of the bank, one more than the most of these.
ROWS = (B, FEW + 1)
SIZES = (5, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 700)


def embeddings(size, seed=0, rows=B):
    """Queries, keys close to them, and a bank of which some rows are as close."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(16, D))
    of = rng.integers(0, 16, (rows,))
    query, key = (centres[of] + 0.5 * rng.normal(size=(rows, D)) for _ in range(2))
    bank = centres[rng.integers(0, 16, size)] + rng.normal(size=(size, D))
    return [unit(x.astype(np.float32)) for x in (query, key, bank)]


def nce(reading, temperature):
    def loss(query, key, bank):
        each = info_nce(query, key, bank, temperature=temperature, reading=reading)
        return jnp.mean(each), each

    return jax.jit(jax.grad(loss, has_aux=True))


def seed(reading, temperature):
    def loss(student, teacher, bank):
        each = soft_cross_entropy(
            student, teacher, bank, student_temperature=0.2, teacher_temperature=temperature,
            reading=reading,
        )  # fmt: skip
        return jnp.mean(each), each

    return jax.jit(jax.grad(loss, has_aux=True))


def in_float64(query, key, bank, temperature):
    """InfoNCE and its gradient by the query, by the formula in NumPy."""
    query, key, bank = (np.asarray(x, np.float64) for x in (query, key, bank))
    logits = np.concatenate([np.sum(query * key, 1)[:, None], query @ bank.T], 1) / temperature
    logits -= logits.max(1, keepdims=True)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    mean = shares[:, :1] * key + shares[:, 1:] @ bank
    return (mean - key) / temperature / len(query), -np.log(shares[:, 0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [0.2, COLDEST, 0.01])
@pytest.mark.parametrize("rows", ROWS)
def test_info_nce_is_the_formula_whatever_the_size_of_the_bank(size, temperature, rows):
    arguments = embeddings(size, rows=rows)
    expected = in_float64(*arguments, temperature)
    for ours, theirs in zip(nce(Reading(), temperature)(*arguments), expected, strict=True):
        assert helpers.relative_error(ours, theirs) < EXACT


@pytest.mark.parametrize("temperature", [0.04, 0.01, 1e-3])
@pytest.mark.parametrize("rows", ROWS)
def test_seeds_loss_is_the_formula(temperature, rows):
    arguments = embeddings(2 * BLOCK + 9, rows=rows)
    expected = seed(FORMULA, temperature)(*arguments)
    for ours, theirs in zip(seed(Reading(), temperature)(*arguments), expected, strict=True):
        assert helpers.relative_error(ours, theirs) < EXACT


@pytest.mark.parametrize("half", [False, True])
def test_bfloat16_factors_change_losses_and_gradients_by_less_than_a_thousandth(half):
    reading = Reading(dtype=jnp.bfloat16)
    query, key, bank = embeddings(4 * BLOCK)
    stored = bank.astype(jnp.bfloat16) if half else bank
    for make, temperature in ((nce, 0.2), (nce, 0.1), (seed, 0.04), (seed, 0.01), (seed, 1e-4)):
        if half and make is seed:
            continue  # its queue is never kept so
        expected = make(FORMULA, temperature)(query, key, bank)
        found = make(reading, temperature)(query, key, stored)
        for ours, theirs in zip(found, expected, strict=True):
            error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            assert 1e-7 < error < HALF, (make, temperature)


def test_a_teacher_in_bfloat16_would_be_further_off_than_that():
    """Or the test above would not see what its products are kept in float32 for."""
    _, teacher, bank = embeddings(4 * BLOCK)
    rough = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (teacher, bank))
    exact, away = (attended(t, b, temperature=1e-4) for t, b in ((teacher, bank), tuple(rough)))
    assert np.linalg.norm(away - exact) > HALF * np.linalg.norm(exact)


def test_opposite_rows_at_the_coldest_temperature_leave_a_finite_sum():
    query = unit(np.ones((B, D), np.float32))
    found = compared(query, -jnp.ones((7, 1)) * query[:1], temperature=COLDEST)
    np.testing.assert_allclose(found.total, np.log(7) - 1 / COLDEST, rtol=EXACT)
    np.testing.assert_allclose(found.nearest, -1, rtol=EXACT)


def test_batches_that_read_together_get_what_each_would_alone():
    query, key, bank = embeddings(100)
    together = compared_together({3: query, 1: key}, bank, temperature=0.2)
    for name, rows in ((3, query), (1, key)):
        alone = compared(rows, bank, temperature=0.2)
        for ours, theirs in zip(together[name], alone, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    nearest = np.max(np.asarray(key) @ np.asarray(bank).T, axis=1)
    np.testing.assert_allclose(together[1].nearest, nearest, rtol=EXACT)


def test_attention_at_low_temperatures_reads_the_row_itself_and_at_high_ones_the_mean():
    query, _, bank = embeddings(50)
    np.testing.assert_allclose(attended(query, bank, temperature=1e-6), query, atol=1e-6)
    mean = (np.asarray(query) + np.sum(bank, 0, keepdims=True)) / 51
    np.testing.assert_allclose(attended(query, bank, temperature=1e6), mean, atol=1e-5)


@pytest.mark.parametrize("count", ROWS)
def test_each_row_that_attends_has_its_own_shift(count):
    """Seen by rows of different lengths only: those of unit rows differ by rounding."""
    query, _, bank = embeddings(2 * BLOCK, rows=count)
    query = query * jnp.linspace(0.5, 1, count)[:, None]
    every = jnp.concatenate([jnp.sum(query**2, 1, keepdims=True), query @ bank.T], axis=1)
    shares = jax.nn.softmax(every / 0.05)
    expected = shares[:, :1] * query + shares[:, 1:] @ bank
    assert helpers.relative_error(attended(query, bank, temperature=0.05), expected) < EXACT


@pytest.mark.parametrize("count", [FEW, FEW + 1])
def test_no_memory_of_a_queues_size_is_taken_on_a_cpu(count):
    def needed(function, size):
        rows = jax.ShapeDtypeStruct((count, 128), jnp.float32)
        bank = jax.ShapeDtypeStruct((size, 128), jnp.float32)
        return function.lower(rows, rows, bank).compile().memory_analysis().temp_size_in_bytes

    small, large = 2**16, 2**20
    assert needed(nce(FORMULA, 0.2), small) > 10e6
    for function in (nce(Reading(), 0.2), seed(Reading(), 0.01)):
        assert needed(function, large) < min(4e6, 1.01 * needed(function, small))


def test_what_a_bank_must_be_is_checked_while_tracing():
    query, _, bank = embeddings(10)
    for rows, wrong in ((query, bank[:, 1:]), (query.astype(jnp.bfloat16), bank),
                        (query, bank.astype(jnp.float16))):  # fmt: skip
        with pytest.raises(AssertionError):
            compared(rows, wrong, temperature=0.2)
    with pytest.raises(AssertionError):
        attended(query, bank.astype(jnp.bfloat16), temperature=0.2)


def with_gradient(read):
    """read(rows, bank) -> `Compared`, and the gradient of uneven sums of it by the rows."""

    def both(rows, bank, weights):
        def total(rows):
            found = read(rows, bank)
            return jnp.sum(weights * found.total), found

        return jax.grad(total, has_aux=True)(rows)

    return both


def shared_by(replicas, read, rows, bank, *more):
    """read(rows, bank, ...) of replicas that have a part of both, put together."""
    parts = (x.reshape(replicas, -1, *x.shape[1:]) for x in (rows, bank, *more))
    made = jax.jit(jax.vmap(read, axis_name=AXIS))(*parts)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), made)


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize(
    "reading, temperature",
    [(Reading(), 0.2), (Reading(), 0.01), (FORMULA, 0.2), (Reading(dtype=jnp.bfloat16), 0.2)],
)
def test_a_bank_that_replicas_share_reads_as_the_whole(reading, temperature, replicas):
    """Totals, the nearest, and the gradient of totals that count differently."""
    query, _, bank = embeddings(2 * BLOCK)
    weights = jnp.arange(1.0, B + 1)
    read = functools.partial(compared, temperature=temperature, reading=reading)
    expected = with_gradient(read)(query, bank, weights)
    together = with_gradient(functools.partial(read, shared=True))
    found = shared_by(replicas, together, query, bank, weights)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert helpers.relative_error(ours, theirs) < EXACT


@pytest.mark.parametrize("reading", [Reading(), FORMULA])
@pytest.mark.parametrize("temperature", [0, 1e-4, 0.04])
def test_seeds_loss_of_a_bank_that_replicas_share(reading, temperature):
    student, teacher, bank = embeddings(400)

    def loss(student, bank, teacher, shared):
        each = soft_cross_entropy(
            student, teacher, bank, student_temperature=0.2, teacher_temperature=temperature,
            reading=reading, shared=shared,
        )  # fmt: skip
        return jnp.sum(each), each

    whole = jax.grad(functools.partial(loss, shared=False), has_aux=True)
    parts = jax.grad(functools.partial(loss, shared=True), has_aux=True)
    found = shared_by(4, parts, student, bank, teacher)
    for ours, theirs in zip(found, whole(student, bank, teacher), strict=True):
        assert helpers.relative_error(ours, theirs) < EXACT


@pytest.mark.parametrize("shared", [False, True])
def test_the_closest_row_is_the_largest_product_and_the_first_of_several(shared):
    query, _, bank = embeddings(40)
    bank = jnp.concatenate([bank[:20], bank])  # each twice, from row 20 and from row 0 on
    expected = np.argmax(np.asarray(query) @ np.asarray(bank).T, axis=1)
    assert np.min(expected) < 20 and len(set(expected.tolist())) > 2
    read = functools.partial(closest, shared=shared)
    found = shared_by(4, read, query, bank) if shared else read(query, bank)
    np.testing.assert_array_equal(found, expected)
