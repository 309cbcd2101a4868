"""Tests one-pass computation over queues: equal to the formulas, without a queue-sized array."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax.ops.collectives import AXIS
from disco_jax.ops.losses import info_nce, soft_cross_entropy
from disco_jax.ops.queues import (
    BLOCK,
    MIN_TEMPERATURE,
    SMALL_BATCH,
    QueueAccess,
    nearest,
    queue_attention,
    queue_logsumexp,
    queue_logsumexp_of_each,
)
from disco_jax.ops.vectors import l2_normalize

B, D = 8, 32
EXACT, HALF = 1e-5, 1e-3  # relative tolerances for float32 and bfloat16 factors
FORMULA = QueueAccess(one_pass=False)
# Batch sizes of both CPU algorithms: [queue, batch] products up to FEW rows, [batch, queue] above.
ROWS = (B, SMALL_BATCH + 1)
SIZES = (5, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 700)


def embeddings(size, seed=0, rows=B):
    """Returns queries, keys close to them, and a queue with some rows equally close."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(16, D))
    labels = rng.integers(0, 16, (rows,))
    query, key = (centres[labels] + 0.5 * rng.normal(size=(rows, D)) for _ in range(2))
    queue = centres[rng.integers(0, 16, size)] + rng.normal(size=(size, D))
    return [l2_normalize(x.astype(np.float32)) for x in (query, key, queue)]


def nce(reading, temperature):
    def loss(query, key, queue):
        losses = info_nce(query, key, queue, temperature=temperature, reading=reading)
        return jnp.mean(losses), losses

    return jax.jit(jax.grad(loss, has_aux=True))


def seed(reading, temperature):
    def loss(student, teacher, queue):
        losses = soft_cross_entropy(
            student, teacher, queue, student_temperature=0.2, teacher_temperature=temperature,
            reading=reading,
        )  # fmt: skip
        return jnp.mean(losses), losses

    return jax.jit(jax.grad(loss, has_aux=True))


def in_float64(query, key, queue, temperature):
    """Computes InfoNCE and its gradient with respect to the query in NumPy."""
    query, key, queue = (np.asarray(x, np.float64) for x in (query, key, queue))
    logits = np.concatenate([np.sum(query * key, 1)[:, None], query @ queue.T], 1) / temperature
    logits -= logits.max(1, keepdims=True)
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    mean = probs[:, :1] * key + probs[:, 1:] @ queue
    return (mean - key) / temperature / len(query), -np.log(probs[:, 0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [0.2, MIN_TEMPERATURE, 0.01])
@pytest.mark.parametrize("rows", ROWS)
def test_info_nce_is_the_formula_whatever_the_size_of_the_bank(size, temperature, rows):
    arguments = embeddings(size, rows=rows)
    expected = in_float64(*arguments, temperature)
    actual = nce(QueueAccess(), temperature)(*arguments)
    for array, reference in zip(actual, expected, strict=True):
        assert helpers.relative_error(array, reference) < EXACT


@pytest.mark.parametrize("temperature", [0.04, 0.01, 1e-3])
@pytest.mark.parametrize("rows", ROWS)
def test_seeds_loss_is_the_formula(temperature, rows):
    arguments = embeddings(2 * BLOCK + 9, rows=rows)
    expected = seed(FORMULA, temperature)(*arguments)
    actual = seed(QueueAccess(), temperature)(*arguments)
    for array, reference in zip(actual, expected, strict=True):
        assert helpers.relative_error(array, reference) < EXACT


@pytest.mark.parametrize("half", [False, True])
def test_bfloat16_factors_change_losses_and_gradients_by_less_than_a_thousandth(half):
    reading = QueueAccess(dtype=jnp.bfloat16)
    query, key, queue = embeddings(4 * BLOCK)
    stored = queue.astype(jnp.bfloat16) if half else queue
    for make, temperature in ((nce, 0.2), (nce, 0.1), (seed, 0.04), (seed, 0.01), (seed, 1e-4)):
        if half and make is seed:
            continue  # its queue is always stored in float32
        expected = make(FORMULA, temperature)(query, key, queue)
        actual = make(reading, temperature)(query, key, stored)
        for array, reference in zip(actual, expected, strict=True):
            error = np.linalg.norm(array - reference) / np.linalg.norm(reference)
            assert 1e-7 < error < HALF, (make, temperature)


def test_a_teacher_in_bfloat16_would_be_further_off_than_that():
    """Shows that the test above can fail: the teacher's products need float32."""
    _, teacher, queue = embeddings(4 * BLOCK)
    rough = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (teacher, queue))
    exact, away = (
        queue_attention(t, b, temperature=1e-4) for t, b in ((teacher, queue), tuple(rough))
    )
    assert np.linalg.norm(away - exact) > HALF * np.linalg.norm(exact)


def test_opposite_rows_at_the_coldest_temperature_leave_a_finite_sum():
    query = l2_normalize(np.ones((B, D), np.float32))
    similarities = queue_logsumexp(
        query, -jnp.ones((7, 1)) * query[:1], temperature=MIN_TEMPERATURE
    )
    np.testing.assert_allclose(similarities.total, np.log(7) - 1 / MIN_TEMPERATURE, rtol=EXACT)
    np.testing.assert_allclose(similarities.nearest, -1, rtol=EXACT)


def test_batches_that_read_together_get_what_each_would_alone():
    query, key, queue = embeddings(100)
    together = queue_logsumexp_of_each({3: query, 1: key}, queue, temperature=0.2)
    for name, rows in ((3, query), (1, key)):
        alone = queue_logsumexp(rows, queue, temperature=0.2)
        for array, reference in zip(together[name], alone, strict=True):
            np.testing.assert_allclose(array, reference, rtol=1e-6)
    nearest = np.max(np.asarray(key) @ np.asarray(queue).T, axis=1)
    np.testing.assert_allclose(together[1].nearest, nearest, rtol=EXACT)


def test_attention_at_low_temperatures_reads_the_row_itself_and_at_high_ones_the_mean():
    query, _, queue = embeddings(50)
    np.testing.assert_allclose(queue_attention(query, queue, temperature=1e-6), query, atol=1e-6)
    mean = (np.asarray(query) + np.sum(queue, 0, keepdims=True)) / 51
    np.testing.assert_allclose(queue_attention(query, queue, temperature=1e6), mean, atol=1e-5)


@pytest.mark.parametrize("count", ROWS)
def test_each_row_that_attends_has_its_own_shift(count):
    """Uses rows of different lengths, because the shifts of unit rows differ only by rounding."""
    query, _, queue = embeddings(2 * BLOCK, rows=count)
    query = query * jnp.linspace(0.5, 1, count)[:, None]
    logits = jnp.concatenate([jnp.sum(query**2, 1, keepdims=True), query @ queue.T], axis=1)
    probs = jax.nn.softmax(logits / 0.05)
    expected = probs[:, :1] * query + probs[:, 1:] @ queue
    assert helpers.relative_error(queue_attention(query, queue, temperature=0.05), expected) < EXACT


@pytest.mark.parametrize("count", [SMALL_BATCH, SMALL_BATCH + 1])
def test_no_memory_of_a_queues_size_is_taken_on_a_cpu(count):
    def temporary_bytes(function, size):
        rows = jax.ShapeDtypeStruct((count, 128), jnp.float32)
        queue = jax.ShapeDtypeStruct((size, 128), jnp.float32)
        return function.lower(rows, rows, queue).compile().memory_analysis().temp_size_in_bytes

    small, large = 2**16, 2**20
    assert temporary_bytes(nce(FORMULA, 0.2), small) > 10e6
    for function in (nce(QueueAccess(), 0.2), seed(QueueAccess(), 0.01)):
        limit = min(4e6, 1.01 * temporary_bytes(function, small))
        assert temporary_bytes(function, large) < limit


def test_what_a_bank_must_be_is_checked_while_tracing():
    query, _, queue = embeddings(10)
    for rows, wrong in ((query, queue[:, 1:]), (query.astype(jnp.bfloat16), queue),
                        (query, queue.astype(jnp.float16))):  # fmt: skip
        with pytest.raises(AssertionError):
            queue_logsumexp(rows, wrong, temperature=0.2)
    with pytest.raises(AssertionError):
        queue_attention(query, queue.astype(jnp.bfloat16), temperature=0.2)


def with_gradient(read):
    """Returns a function that also computes the gradient of a weighted sum of the totals.

    Args:
      read: function (rows, queue) -> `QueueLogSumExp`.
    """

    def both(rows, queue, weights):
        def weighted(rows):
            similarities = read(rows, queue)
            return jnp.sum(weights * similarities.total), similarities

        return jax.grad(weighted, has_aux=True)(rows)

    return both


def shared_by(replicas, read, rows, queue, *more):
    """Runs read(rows, queue, ...) on replicas with a shard of each and concatenates the results."""
    parts = (x.reshape(replicas, -1, *x.shape[1:]) for x in (rows, queue, *more))
    shards = jax.jit(jax.vmap(read, axis_name=AXIS))(*parts)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), shards)


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize(
    "reading, temperature",
    [
        (QueueAccess(), 0.2),
        (QueueAccess(), 0.01),
        (FORMULA, 0.2),
        (QueueAccess(dtype=jnp.bfloat16), 0.2),
    ],
)
def test_a_bank_that_replicas_share_reads_as_the_whole(reading, temperature, replicas):
    """Compares totals, largest similarities, and the gradient of a weighted sum of totals."""
    query, _, queue = embeddings(2 * BLOCK)
    weights = jnp.arange(1.0, B + 1)
    read = functools.partial(queue_logsumexp, temperature=temperature, reading=reading)
    expected = with_gradient(read)(query, queue, weights)
    together = with_gradient(functools.partial(read, shared=True))
    actual = shared_by(replicas, together, query, queue, weights)
    for array, reference in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert helpers.relative_error(array, reference) < EXACT


@pytest.mark.parametrize("reading", [QueueAccess(), FORMULA])
@pytest.mark.parametrize("temperature", [0, 1e-4, 0.04])
def test_seeds_loss_of_a_bank_that_replicas_share(reading, temperature):
    student, teacher, queue = embeddings(400)

    def loss(student, queue, teacher, shared):
        losses = soft_cross_entropy(
            student, teacher, queue, student_temperature=0.2, teacher_temperature=temperature,
            reading=reading, shared=shared,
        )  # fmt: skip
        return jnp.sum(losses), losses

    whole = jax.grad(functools.partial(loss, shared=False), has_aux=True)
    parts = jax.grad(functools.partial(loss, shared=True), has_aux=True)
    actual = shared_by(4, parts, student, queue, teacher)
    for array, reference in zip(actual, whole(student, queue, teacher), strict=True):
        assert helpers.relative_error(array, reference) < EXACT


@pytest.mark.parametrize("shared", [False, True])
def test_the_closest_row_is_the_largest_product_and_the_first_of_several(shared):
    query, _, queue = embeddings(40)
    queue = jnp.concatenate([queue[:20], queue])  # each row twice, at i and i + 20
    expected = np.argmax(np.asarray(query) @ np.asarray(queue).T, axis=1)
    assert np.min(expected) < 20 and len(set(expected.tolist())) > 2
    read = functools.partial(nearest, shared=shared)
    actual = shared_by(4, read, query, queue) if shared else read(query, queue)
    np.testing.assert_array_equal(actual, expected)
