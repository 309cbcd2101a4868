"""Rows that travel between replicas, and come home."""

import jax
import jax.numpy as jnp
import numpy as np

from disco_jax.ops.collectives import AXIS, gather, positions, replicas, shuffle, unshuffle

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


def test_shuffles_follow_the_key():
    def mixed(seed):
        return on_all(lambda rows: shuffle(jax.random.key(seed), rows)[0])

    np.testing.assert_array_equal(mixed(0), mixed(0))
    assert not np.array_equal(mixed(0), mixed(1))
