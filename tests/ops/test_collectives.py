"""Rows that travel between replicas, and come home."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disco_jax.ops.collectives import (
    AXIS,
    EXCHANGES,
    gather,
    highest,
    positions,
    replicas,
    scatter,
    shuffle,
    unshuffle,
)

REPLICAS, BATCH = 4, 3
ROWS = jnp.arange(REPLICAS * BATCH * 2.0).reshape(REPLICAS, BATCH, 2)


def on_all(function):
    return jax.vmap(function, axis_name=AXIS)(ROWS)


def test_gather_and_positions_follow_the_order_of_the_replicas():
    everyone = on_all(gather)
    for mine in everyone:
        np.testing.assert_array_equal(mine, ROWS.reshape(-1, 2))
    places = on_all(lambda rows: positions(rows.shape[0]))
    np.testing.assert_array_equal(places.ravel(), np.arange(REPLICAS * BATCH))
    assert set(on_all(lambda rows: jnp.int32(replicas())).tolist()) == {REPLICAS}


def test_each_replica_gets_its_part_of_a_sum():
    """Of what all have for all: replica i adds i to its 12 rows."""
    me = jnp.arange(REPLICAS * 1.0)
    everyones = ROWS.reshape(1, -1, 2) + me[:, None, None]
    parts = jax.vmap(scatter, axis_name=AXIS)(everyones)
    np.testing.assert_array_equal(parts, REPLICAS * ROWS + me.sum())


def test_the_highest_is_of_all_replicas_element_by_element():
    rows = ROWS * jnp.array([[[1.0, -1.0]]])
    for found in jax.vmap(highest, axis_name=AXIS)(rows):
        np.testing.assert_array_equal(found, rows.max(0))


def test_shuffle_is_a_permutation_that_mixes_replicas_and_unshuffle_undoes_it():
    def there_and_back(rows):
        mixed, order = shuffle(jax.random.key(1), rows)
        return mixed, unshuffle(mixed * 10, order)

    mixed, back = on_all(there_and_back)
    np.testing.assert_array_equal(back, ROWS * 10)
    flat, original = (x.reshape(-1, 2).tolist() for x in (mixed, ROWS))
    assert sorted(flat) == sorted(original) and flat != original
    home = [set(map(tuple, replica.tolist())) for replica in ROWS]
    assert any(set(map(tuple, m.tolist())) - h for m, h in zip(mixed, home, strict=True))


def ragged(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all`, which CPUs do not have, as its documentation words it."""
    rows, begins, sizes, places = (
        jax.lax.all_gather(x, axis_name)
        for x in (operand, input_offsets, send_sizes, output_offsets)
    )
    me = jax.lax.axis_index(axis_name)
    at = jnp.arange(len(output))
    for source in range(REPLICAS):
        begin, size, place = (x[source, me] for x in (begins, sizes, places))
        # What a source sends and what is expected of it must agree, or nothing arrives.
        sent = (at >= place) & (at < place + size) & (size == recv_sizes[source])
        taken = rows[source][jnp.clip(at - place + begin, 0, len(output) - 1)]
        output = jnp.where(sent[:, None], taken, output)
    return output


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_rows_traded_one_by_one_are_those_of_the_whole_batch(monkeypatch, batch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged)
    rows = jnp.arange(1.0, REPLICAS * batch * 2 + 1).reshape(REPLICAS, batch, 2)

    def mixed(rows, key, exchange):
        found, order = shuffle(key, rows, exchange)
        return found, order, unshuffle(found, order)

    both = [
        jax.jit(
            jax.vmap(functools.partial(mixed, exchange=name), in_axes=(0, None), axis_name=AXIS)
        )
        for name in EXCHANGES
    ]
    for seed in range(5):
        gathered, traded = (one(rows, jax.random.key(seed)) for one in both)
        for theirs, ours in zip(gathered, traded, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(traded[2], rows)


def test_shuffles_follow_the_key():
    def mixed(seed):
        return on_all(lambda rows: shuffle(jax.random.key(seed), rows)[0])

    np.testing.assert_array_equal(mixed(0), mixed(0))
    assert not np.array_equal(mixed(0), mixed(1))
