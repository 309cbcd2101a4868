"""Tests of the queue: order, wrap-around, invalid pushes, and sharding over replicas."""

import dataclasses

import jax
import numpy as np
import pytest

import helpers
from disco_jax.ops.collectives import AXIS
from disco_jax.ops.memory import Queue
from disco_jax.ops.vectors import l2_normalize


@pytest.mark.parametrize("name", ["a", "b"])
def test_push_follows_the_official_order_through_a_wrap(name):
    meta, ref = helpers.fixture(f"losses/moco_infonce_{name}")
    queue = Queue(ref["queue_init"].T, np.int32(ref["ptr_init"]))
    wrapped = False
    for step in range(meta["params"]["steps"]):
        queue = queue.push(l2_normalize(ref["k_raw"][step]))
        np.testing.assert_allclose(queue.vectors, ref["queue"][step].T, atol=1e-6)
        assert queue.pointer == ref["ptr"][step]
        wrapped |= int(queue.pointer) == 0
    assert wrapped


def test_create_gives_unit_rows_that_follow_the_key():
    queue = Queue.create(jax.random.key(3), 12, 8)
    np.testing.assert_allclose(np.linalg.norm(queue.vectors, axis=1), 1, atol=1e-6)
    again = Queue.create(jax.random.key(3), 12, 8)
    other = Queue.create(jax.random.key(4), 12, 8)
    np.testing.assert_array_equal(queue.vectors, again.vectors)
    assert not np.allclose(queue.vectors, other.vectors)


@pytest.mark.parametrize("rows", [(13, 8), (4, 7)])
def test_push_refuses_rows_that_do_not_fit(rows):
    with pytest.raises(AssertionError):
        Queue.create(jax.random.key(0), 12, 8).push(np.ones(rows, np.float32))


def test_a_rewound_queue_has_its_oldest_row_first_and_takes_pushes_of_any_size():
    rows = [
        l2_normalize(np.random.default_rng(i).normal(size=(4, 8)).astype(np.float32))
        for i in range(4)
    ]
    queue = Queue.create(jax.random.key(0), 12, 8)
    for batch in rows:
        queue = queue.push(batch)
    oldest_first = queue.rewound()
    np.testing.assert_array_equal(oldest_first.vectors, np.concatenate(rows[1:]))
    assert queue.pointer == 4 and oldest_first.pointer == 0
    after = oldest_first.push(np.concatenate([rows[0], rows[0][:2]]))
    np.testing.assert_array_equal(after.vectors[6:], np.concatenate(rows[1:])[6:])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_a_queue_that_replicas_share_holds_what_each_of_them_would(replicas, half):
    """Pushes through a wrap; each row stays on the replica that pushed it."""
    size, batch, dim = 24, 8, 4
    whole = Queue.create(jax.random.key(0), size, dim).stored(half)
    shared = whole.stored(half, shared=batch).shard(replicas)
    assert shared.vectors.shape == (replicas, size // replicas, dim)
    axes = dataclasses.replace(shared, vectors=0, pointer=None)
    push = jax.jit(
        jax.vmap(
            lambda queue, rows: (queue.push_all(rows), queue.size),
            in_axes=(axes, 0), out_axes=(axes, None), axis_name=AXIS,
        )
    )  # fmt: skip
    for i in range(5):
        rows = Queue.create(jax.random.key(1 + i), batch, dim).vectors
        whole = whole.push(rows)
        shared, count = push(shared, rows.reshape(replicas, batch // replicas, dim))
        unsharded = shared.unshard()
        np.testing.assert_array_equal(unsharded.vectors, whole.vectors)
        assert unsharded.vectors.dtype == whole.vectors.dtype
        assert unsharded.pointer == whole.pointer and count == size
    if replicas > 1:  # otherwise any order would pass
        assert not np.array_equal(shared.vectors.reshape(size, dim), whole.vectors)


def test_a_push_of_all_into_a_whole_queue_is_of_their_rows_in_order():
    queue = Queue.create(jax.random.key(0), 12, 8)
    rows = Queue.create(jax.random.key(1), 6, 8).vectors
    pushed = jax.vmap(lambda local: queue.push_all(local), axis_name=AXIS)(rows.reshape(3, 2, 8))
    for vectors in pushed.vectors:
        np.testing.assert_array_equal(vectors, queue.push(rows).vectors)


def test_a_shared_queue_refuses_a_push_of_another_size_than_it_is_dealt_by():
    queue = Queue.create(jax.random.key(0), 12, 8).stored(False, shared=6)
    with pytest.raises(AssertionError):
        jax.vmap(lambda local: queue.push_all(local), axis_name=AXIS)(
            np.ones((2, 2, 8), np.float32)
        )
