"""The queue: order, wrap-around, and what it refuses."""

import jax
import numpy as np
import pytest

import helpers
from disco_jax.ops.losses import unit
from disco_jax.ops.memory import Queue


@pytest.mark.parametrize("name", ["a", "b"])
def test_push_follows_the_official_order_through_a_wrap(name):
    meta, ref = helpers.fixture(f"losses/moco_infonce_{name}")
    queue = Queue(ref["queue_init"].T, np.int32(ref["ptr_init"]))
    wrapped = False
    for step in range(meta["params"]["steps"]):
        queue = queue.push(unit(ref["k_raw"][step]))
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
