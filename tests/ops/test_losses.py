"""Tests losses against the official PyTorch code and by their mathematical properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax.ops.losses import (
    contrast_accuracy,
    info_nce,
    soft_cross_entropy,
    softened_cross_entropy,
    squared_distance,
)
from disco_jax.ops.queues import queue_logsumexp
from disco_jax.ops.vectors import l2_normalize

LOSS, GRADIENT = 1e-5, 1e-5  # relative to the largest value


@pytest.mark.parametrize("name", ["a", "b"])
def test_info_nce_matches_official_moco(name):
    meta, ref = helpers.fixture(f"losses/moco_infonce_{name}")
    queue = ref["queue_init"].T

    def loss(query, key, queue):
        return jnp.mean(
            info_nce(
                l2_normalize(query),
                l2_normalize(key),
                queue,
                temperature=meta["params"]["temperature"],
            )
        )

    gradient = jax.jit(jax.value_and_grad(loss))
    for step in range(meta["params"]["steps"]):
        query, key = ref["q_raw"][step], ref["k_raw"][step]
        value, grad = gradient(query, key, queue)
        assert helpers.relative_error(value, ref["loss"][step]) < LOSS
        assert helpers.relative_error(grad, ref["grad_q_raw"][step]) < GRADIENT
        nearest = queue_logsumexp(l2_normalize(query), queue, temperature=0.2).nearest
        accuracy = 100 * np.mean(contrast_accuracy(l2_normalize(query), l2_normalize(key), nearest))
        assert accuracy == pytest.approx(ref["acc1"][step].item())
        queue = ref["queue"][step].T


@pytest.mark.parametrize("name", ["a", "b"])
def test_disco_total_matches_official(name):
    meta, ref = helpers.fixture(f"losses/disco_total_{name}")
    queue = ref["queue_init"].T
    batch = meta["params"]["batch"]

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(student_q, student_k, teachers, key, queue, contrast):
        distances = [
            jnp.mean(squared_distance(l2_normalize(student), l2_normalize(teacher)))
            for student, teacher in zip((student_q, student_k), teachers, strict=True)
        ]
        nce = info_nce(
            l2_normalize(student_q),
            l2_normalize(key),
            queue,
            temperature=meta["params"]["temperature"],
        )
        # The official code sums over the batch: weight `batch` on the mean.
        return contrast * jnp.mean(nce) + batch * sum(distances)

    for step in range(meta["params"]["steps"]):
        students = ref["student_q_raw"][step], ref["student_k_raw"][step]
        teachers = ref["teacher_q_raw"][step], ref["teacher_k_raw"][step]
        for contrast, total, prefix in (
            (1, "loss", "grad_"),
            (0, "loss_only_mse", "grad_only_mse_"),
        ):
            value, grads = loss(*students, teachers, ref["key_raw"][step], queue, contrast)
            assert helpers.relative_error(value, ref[total][step]) < LOSS
            for view, grad in zip("qk", grads, strict=True):
                expected = ref[f"{prefix}student_{view}_raw"][step]
                assert helpers.relative_error(grad, expected) < GRADIENT
        queue = ref["queue"][step].T


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_seed_matches_official(name):
    meta, ref = helpers.fixture(f"losses/seed_{name}")
    queue, settings_ = ref["queue_init"].T, meta["params"]

    def loss(student, teacher, queue):
        return jnp.mean(
            soft_cross_entropy(
                l2_normalize(student),
                l2_normalize(teacher),
                queue,
                student_temperature=settings_["student_t"],
                teacher_temperature=settings_["teacher_temp"],
            )
        )

    gradient = jax.jit(jax.value_and_grad(loss))
    for step in range(settings_["steps"]):
        value, grad = gradient(ref["student_raw"][step], ref["teacher_raw"][step], queue)
        assert helpers.relative_error(value, ref["loss"][step]) < LOSS
        assert helpers.relative_error(grad, ref["grad_student_raw"][step]) < GRADIENT
        queue = ref["queue"][step].T


def test_seed_with_a_sharp_teacher_is_info_nce():
    rng = np.random.default_rng(0)
    student, teacher, queue = (
        l2_normalize(rng.normal(size=(n, 16)).astype("f")) for n in (8, 8, 64)
    )

    def seed(student, temperature):
        losses = soft_cross_entropy(
            student, teacher, queue, student_temperature=0.2, teacher_temperature=temperature
        )
        return jnp.sum(losses), losses

    def contrast(student):
        losses = info_nce(student, teacher, queue, temperature=0.2)
        return jnp.sum(losses), losses

    grad, expected = jax.grad(contrast, has_aux=True)(student)
    deviations = []
    for temperature in (1.0, 0.1, 0.03, 1e-3, 1e-6, 0.0):
        to_student, losses = jax.grad(seed, has_aux=True)(student, temperature)
        deviations.append(helpers.relative_error(losses, expected))
        if temperature <= 1e-3:
            assert deviations[-1] < 1e-6 and helpers.relative_error(to_student, grad) < 1e-6
    assert deviations[0] > deviations[1] > deviations[2] > 1e-6 and deviations[0] > 0.1


def test_squared_distance_of_unit_rows_is_two_minus_two_cosines():
    distance = jax.jit(lambda a, b: squared_distance(l2_normalize(a), l2_normalize(b)))
    for seed in range(25):
        a, b = np.random.default_rng(seed).normal(size=(2, 9, 33)).astype("f")
        cosines = np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        np.testing.assert_allclose(distance(a, b), 2 - 2 * cosines, atol=1e-5)


def test_unit_of_zero_is_zero_and_has_a_finite_gradient():
    rows = jnp.zeros((2, 4)).at[1, 0].set(3.0)
    np.testing.assert_array_equal(l2_normalize(rows), [[0, 0, 0, 0], [1, 0, 0, 0]])
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(l2_normalize(x)))(rows)))


def test_contracts_are_checked_while_tracing():
    ones = jnp.ones
    with pytest.raises(AssertionError):
        info_nce(ones((2, 3)), ones((2, 4)), ones((5, 3)), temperature=0.2)
    with pytest.raises(AssertionError):
        info_nce(ones((2, 3), jnp.bfloat16), ones((2, 3)), ones((5, 3)), temperature=0.2)


@pytest.mark.parametrize("name", ["a", "b"])
def test_distillation_with_labels_matches_official_disco(name):
    meta, ref = helpers.fixture(f"losses/kd_ce_{name}")
    params = meta["params"]

    def loss(student):
        return jnp.mean(
            softened_cross_entropy(
                student,
                ref["teacher_logits"],
                ref["labels"],
                alpha=params["alpha"],
                temperature=params["temperature"],
            )
        )

    value, grad = jax.jit(jax.value_and_grad(loss))(ref["student_logits"])
    assert helpers.relative_error(value, ref["loss"]) < LOSS
    assert helpers.relative_error(grad, ref["grad_student_logits"]) < GRADIENT


def test_a_distillation_by_batch_is_by_element_times_the_classes():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 6, 5)).astype(np.float32)
    labels = np.arange(6, dtype=np.int32) % 5
    batch, element = (
        softened_cross_entropy(student, teacher, labels, alpha=1.0, reduction=reduction)
        for reduction in ("batch", "element")
    )
    np.testing.assert_allclose(batch, 5 * element, rtol=1e-5)
    plain = softened_cross_entropy(student, teacher, labels, alpha=0.0)
    np.testing.assert_allclose(plain, -jax.nn.log_softmax(student)[np.arange(6), labels], rtol=1e-5)
