"""Tests Barlow Twins between student and teacher against NumPy, and trains a few steps with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax.errors import UserError
from disco_jax.ops.collectives import AXIS
from disco_jax.ops.losses import cross_correlation_loss
from disco_jax.train.state import replicate, shapes
from disco_jax.train.step import parallel

B, D = 16, 6
SYNC = {"student.norm": "sync"}


def embeddings():
    """Returns correlated embeddings [B, D] whose variances are far above the loss's epsilon."""
    rng = np.random.default_rng(0)
    student = 10 * rng.normal(size=(B, D)) + 3
    teacher = student @ rng.normal(size=(D, D)) + 20 * rng.normal(size=(B, D))
    return student.astype(np.float32), teacher.astype(np.float32)


def in_float64(student, teacher, redundancy):
    """Computes eq. 1 of the paper with NumPy's correlation coefficients."""
    stacked = np.concatenate([student, teacher], axis=1).astype(np.float64)
    correlation = np.corrcoef(stacked, rowvar=False)[:D, D:]
    diagonal = np.diag(correlation)
    off_diagonal = np.sum(correlation**2) - np.sum(diagonal**2)
    return np.sum((1 - diagonal) ** 2) + redundancy * off_diagonal


def on_replicas(student, teacher, replicas, redundancy=0.05):
    """Returns the loss of each replica and the gradient averaged over replicas, as in a step."""
    split = (x.reshape(replicas, -1, D) for x in (student, teacher))
    loss = functools.partial(cross_correlation_loss, redundancy=redundancy)
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss), axis_name=AXIS))(*split)
    return values, gradients.reshape(B, D) / replicas


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_the_loss_is_the_formula_over_the_global_batch(replicas):
    student, teacher = embeddings()
    values, _ = on_replicas(student, teacher, replicas)
    np.testing.assert_allclose(values, in_float64(student, teacher, 0.05), rtol=1e-5)


@pytest.mark.parametrize("replicas", [1, 4])
def test_the_gradient_is_that_of_the_formula(replicas):
    student, teacher = embeddings()
    _, gradient = on_replicas(student, teacher, replicas)
    direction = np.random.default_rng(1).normal(size=student.shape)
    ahead, behind = (
        in_float64(student + step * direction, teacher, 0.05) for step in (1e-4, -1e-4)
    )
    assert np.sum(gradient * direction) == pytest.approx((ahead - behind) / 2e-4, rel=1e-4)


def test_equal_decorrelated_embeddings_have_no_loss_and_constant_ones_that_of_no_correlation():
    columns = np.concatenate([np.ones((B, 1)), embeddings()[0]], axis=1)
    rows = (100 * np.linalg.qr(columns)[0][:, 1:]).astype(np.float32)  # orthogonal, of mean 0
    np.testing.assert_allclose(on_replicas(rows, rows, 1)[0], 0, atol=1e-6)
    constant = np.ones((B, D), np.float32)
    values, gradient = on_replicas(constant, rows, 1)
    np.testing.assert_allclose(values, D, rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_a_negative_redundancy_is_refused():
    config = helpers.smoke_config(
        "barlow_twins", **{"objectives.cross_correlation.redundancy": -1.0}
    )
    method = helpers.build_method(config, config.views)
    with pytest.raises(UserError, match=r"redundancy=-1\.0 must be at least 0"):
        method.check(shapes(method, (16,)))


def test_a_few_steps_lower_the_loss_equally_on_one_and_on_four_devices():
    losses = {}
    with helpers.tiny_backbone():
        config = helpers.tiny_config(
            "barlow_twins",
            **SYNC,
            **{"batch_size": 16, "learning_rate.base_lr": 2.0, "learning_rate.warmup_epochs": 0},
        )
        for replicas in (1, 4):
            step, state, frozen, batch = helpers.smoke(config, replicas)
            step = parallel(step, jax.devices()[:replicas])
            devices = jax.devices()[:replicas]
            state, frozen = replicate(state, devices), replicate(frozen, devices)
            losses[replicas] = []
            for _ in range(8):
                state, metrics = step(state, frozen, batch)
                losses[replicas].append(float(jnp.ravel(metrics["cross_correlation/loss"])[0]))
    assert losses[1][-1] < 0.9 * losses[1][0]
    np.testing.assert_allclose(losses[4], losses[1], rtol=1e-3)
