"""Tests of the collective operations on virtual replicas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disco_jax.ops.collectives import (
    AXIS,
    EXCHANGES,
    gather,
    pmax,
    positions,
    psum_scatter,
    replicas,
    shuffle,
    unshuffle,
)

REPLICAS, BATCH = 4, 3
ROWS = jnp.arange(REPLICAS * BATCH * 2.0).reshape(REPLICAS, BATCH, 2)


def on_all(function):
    return jax.vmap(function, axis_name=AXIS)(ROWS)


def test_gather_and_positions_follow_the_order_of_the_replicas():
    for gathered in on_all(gather):
        np.testing.assert_array_equal(gathered, ROWS.reshape(-1, 2))
    indices = on_all(lambda rows: positions(rows.shape[0]))
    np.testing.assert_array_equal(indices.ravel(), np.arange(REPLICAS * BATCH))
    assert set(on_all(lambda rows: jnp.int32(replicas())).tolist()) == {REPLICAS}


def test_each_replica_gets_its_part_of_a_sum():
    """Every replica has all 12 rows; replica i adds i to them."""
    offset = jnp.arange(REPLICAS * 1.0)
    addends = ROWS.reshape(1, -1, 2) + offset[:, None, None]
    parts = jax.vmap(psum_scatter, axis_name=AXIS)(addends)
    np.testing.assert_array_equal(parts, REPLICAS * ROWS + offset.sum())


def test_the_highest_is_of_all_replicas_element_by_element():
    rows = ROWS * jnp.array([[[1.0, -1.0]]])
    for maximum in jax.vmap(pmax, axis_name=AXIS)(rows):
        np.testing.assert_array_equal(maximum, rows.max(0))


def test_shuffle_is_a_permutation_that_mixes_replicas_and_unshuffle_undoes_it():
    def round_trip(rows):
        shuffled, order = shuffle(jax.random.key(1), rows)
        return shuffled, unshuffle(shuffled * 10, order)

    shuffled, restored = on_all(round_trip)
    np.testing.assert_array_equal(restored, ROWS * 10)
    flat, original = (x.reshape(-1, 2).tolist() for x in (shuffled, ROWS))
    assert sorted(flat) == sorted(original) and flat != original
    before, after = (
        [set(map(tuple, replica.tolist())) for replica in batch] for batch in (ROWS, shuffled)
    )
    assert any(rows - own for rows, own in zip(after, before, strict=True))


def ragged(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """Emulates `jax.lax.ragged_all_to_all`, which CPUs lack, as its documentation defines it."""
    rows, starts, sizes, targets = (
        jax.lax.all_gather(x, axis_name)
        for x in (operand, input_offsets, send_sizes, output_offsets)
    )
    me = jax.lax.axis_index(axis_name)
    index = jnp.arange(len(output))
    for source in range(REPLICAS):
        start, size, target = (x[source, me] for x in (starts, sizes, targets))
        # Rows are dropped if the sizes of sender and receiver disagree.
        sent = (index >= target) & (index < target + size) & (size == recv_sizes[source])
        received = rows[source][jnp.clip(index - target + start, 0, len(output) - 1)]
        output = jnp.where(sent[:, None], received, output)
    return output


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_rows_traded_one_by_one_are_those_of_the_whole_batch(monkeypatch, batch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged)
    rows = jnp.arange(1.0, REPLICAS * batch * 2 + 1).reshape(REPLICAS, batch, 2)

    def round_trip(rows, key, exchange):
        shuffled, order = shuffle(key, rows, exchange)
        return shuffled, order, unshuffle(shuffled, order)

    functions = []
    for name in EXCHANGES:
        function = functools.partial(round_trip, exchange=name)
        functions.append(jax.jit(jax.vmap(function, in_axes=(0, None), axis_name=AXIS)))
    for seed in range(5):
        gathered, exchanged = (function(rows, jax.random.key(seed)) for function in functions)
        for expected, actual in zip(gathered, exchanged, strict=True):
            np.testing.assert_array_equal(actual, expected)
        np.testing.assert_array_equal(exchanged[2], rows)


def test_shuffles_follow_the_key():
    def shuffled(seed):
        return on_all(lambda rows: shuffle(jax.random.key(seed), rows)[0])

    np.testing.assert_array_equal(shuffled(0), shuffled(0))
    assert not np.array_equal(shuffled(0), shuffled(1))
