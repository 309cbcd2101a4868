"""Tests Sinkhorn's algorithm against the official code on several numbers of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax.ops.collectives import AXIS
from disco_jax.ops.sinkhorn import sinkhorn
from disco_jax.ops.vectors import l2_normalize


def assign(scores, replicas=1, mask=None, **options):
    """Computes the assignments of a batch that is split over virtual replicas."""
    options = dict(epsilon=0.05, iterations=3) | options
    parts = scores.reshape(replicas, -1, scores.shape[-1])
    mask = jnp.ones(len(scores)) if mask is None else jnp.asarray(mask, jnp.float32)
    run = jax.jit(jax.vmap(lambda s, m: sinkhorn(s, mask=m, **options), axis_name=AXIS))
    return run(parts, mask.reshape(replicas, -1)).reshape(scores.shape)


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("replicas", [1, 4])
def test_matches_the_official_code_on_any_number_of_devices(name, replicas):
    meta, ref = helpers.fixture(f"losses/sinkhorn_{name}")
    options = {key: meta["params"][key] for key in ("epsilon", "iterations")}
    plan = assign(ref["scores"], replicas, **options)
    assert helpers.relative_error(plan, ref["assignments"]) < 1e-5


balance = jax.jit(lambda scores: assign(scores, 4, epsilon=0.5, iterations=12))


@pytest.mark.parametrize("groups, prototypes", [(1, 2), (6, 3), (2, 20)])
def test_rows_sum_to_one_and_prototypes_are_used_alike(groups, prototypes):
    for seed in range(7):
        rng = np.random.default_rng(seed)
        rows = l2_normalize(rng.normal(size=(4 * groups, 8)).astype("f"))
        scores = rows @ l2_normalize(rng.normal(size=(prototypes, 8)).astype("f")).T
        plan = balance(scores)
        np.testing.assert_allclose(np.sum(plan, axis=1), 1.0, atol=1e-5)
        np.testing.assert_allclose(np.sum(plan, axis=0), 4 * groups / prototypes, rtol=1e-3)


def test_rows_that_are_not_there_change_nothing():
    _, ref = helpers.fixture("losses/sinkhorn_a")
    padded = np.concatenate([np.full((4, 10), 0.7, np.float32), ref["scores"], ref["scores"][:4]])
    mask = np.concatenate([np.zeros(4), np.ones(16), np.zeros(4)])
    plan = assign(padded, 4, mask)
    assert helpers.relative_error(plan[4:20], ref["assignments"]) < 1e-5
    np.testing.assert_array_equal(plan[:4], 0)


def test_great_scores_do_not_overflow_and_no_gradient_passes():
    scores = np.asarray([[100.0, 99.9], [99.9, 100.0]], np.float32)
    assert np.isfinite(assign(scores)).all()
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(jnp.square(assign(s)))))(scores)
    np.testing.assert_array_equal(gradient, 0)
