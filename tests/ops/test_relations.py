"""Tests losses on relations and their queues against the official PyTorch code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax.ops import losses, relations
from disco_jax.ops.memory import Queue
from disco_jax.ops.vectors import l2_normalize

EXACT = 1e-5  # relative tolerance of losses and gradients


def assert_loss(loss, student, expected, gradient):
    value, grad = jax.jit(jax.value_and_grad(loss))(student)
    assert helpers.relative_error(value, expected) < EXACT
    assert helpers.relative_error(grad, gradient) < EXACT


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("kind", ["distance", "angle"])
def test_rkd_matches_official(name, kind):
    _, ref = helpers.fixture(f"losses/rkd_{name}")
    loss = {"distance": relations.rkd_distance, "angle": relations.rkd_angle}[kind]
    assert_loss(lambda s: loss(s, ref["teacher"]), ref["student"], ref[kind], ref[f"grad_{kind}"])


@pytest.mark.parametrize("loss", [relations.rkd_distance, relations.rkd_angle])
def test_rkd_of_equal_rows_has_a_finite_gradient(loss):
    rows = np.ones((4, 8), np.float32)
    rows[0, 0] = 2.0
    grad = jax.jit(jax.grad(loss))(rows, rows[::-1])
    assert np.isfinite(grad).all() and np.abs(grad).max() < 10


@pytest.mark.parametrize("kind", ["distance", "angle"])
def test_rkd_compiled_with_what_normalises_its_rows_is_the_formula(kind):
    """The compiler fuses normalisation and differences, so that equal rows differ by rounding."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 8, 16)).astype(np.float32)
    student[5] = teacher[3] = student[2]  # one image twice in the batch
    teacher[1] = student[2]
    loss = {"distance": relations.rkd_distance, "angle": relations.rkd_angle}[kind]
    run = jax.jit(jax.value_and_grad(lambda s, t: loss(l2_normalize(s), l2_normalize(t))))
    value, grad = run(student, teacher)
    expected = rkd_in_float64(kind, student, teacher)
    assert value == pytest.approx(expected, rel=1e-5)
    direction = np.random.default_rng(1).normal(size=student.shape)
    direction[5] = direction[2]  # equal rows must stay equal: there is no derivative otherwise
    values = [rkd_in_float64(kind, student + h * direction, teacher) for h in (1e-5, -1e-5)]
    expected_slope = (values[0] - values[1]) / 2e-5
    assert np.sum(grad * direction) == pytest.approx(expected_slope, rel=1e-4)


def rkd_in_float64(kind, *rows):
    """Computes RKD's formulas in NumPy on rows that it normalises."""

    def relation(rows):
        rows = rows.astype(np.float64)
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        differences = rows[None] - rows[:, None]
        lengths = np.linalg.norm(differences, axis=-1)
        if kind == "distance":
            return lengths / (lengths.sum() / (lengths.size - len(rows)))
        directions = differences / np.maximum(lengths, 1e-12)[..., None]
        return np.einsum("ijd,ikd->ijk", directions, directions)

    difference = np.abs(relation(rows[0]) - relation(rows[1]))
    return np.where(difference < 1, difference**2 / 2, difference - 0.5).mean()


def test_attention_transfer_matches_official():
    _, ref = helpers.fixture("losses/attention_transfer_a")
    teacher = ref["teacher"].transpose(0, 2, 3, 1)
    assert_loss(
        lambda s: jnp.mean(relations.attention_distance(s, teacher)),
        ref["student"].transpose(0, 2, 3, 1),
        ref["loss"],
        ref["grad_student"].transpose(0, 2, 3, 1),
    )


@pytest.mark.parametrize("name", ["a", "b"])
def test_supervised_distillation_matches_official(name):
    meta, ref = helpers.fixture(f"losses/kd_ce_{name}")
    settings = {key: meta["params"][key] for key in ("alpha", "temperature")}
    labels = jnp.asarray(ref["labels"], jnp.int32)
    loss = functools.partial(losses.softened_cross_entropy, **settings)
    student, teacher = ref["student_logits"], ref["teacher_logits"]
    assert_loss(
        lambda s: jnp.mean(loss(s, teacher, labels)),
        student,
        ref["loss"],
        ref["grad_student_logits"],
    )
    hard = (1 - settings["alpha"]) * losses.class_cross_entropy(student, labels)
    soft, summed = (
        loss(student, teacher, labels, reduction=r) - hard for r in ("element", "batch")
    )
    np.testing.assert_allclose(summed, soft * student.shape[1], rtol=1e-4)


@pytest.mark.parametrize("name", ["1q_a", "2q_a", "2q_momentum_a"])
def test_compress_matches_official_with_its_queues(name):
    """The queues wrap inside a push: 20 rows, 8 per push."""
    meta, ref = helpers.fixture(f"losses/compress_{name}")
    settings, start = meta["params"], jnp.zeros((), jnp.int32)
    teachers = students = Queue(jnp.asarray(ref["teacher_queue_init"]), start)
    if name != "1q_a":
        students = Queue(jnp.asarray(ref["student_queue_init"]), start)
    temperature = settings["temperature"]
    for step in range(settings["steps"]):
        teacher = l2_normalize(ref["teacher_raw"][step])

        def loss(raw, teacher=teacher, students=students, teachers=teachers):
            divergence = relations.bank_divergence(
                l2_normalize(raw),
                teacher,
                students.vectors,
                teachers.vectors,
                student_temperature=temperature,
                target_temperature=temperature,
            )
            return jnp.mean(divergence)

        raw = ref["student_raw"][step]
        assert_loss(loss, raw, ref["loss"][step], ref["grad_student_raw"][step])
        keys = {"1q_a": teacher, "2q_a": l2_normalize(raw)}.get(name)
        keys = l2_normalize(ref["student_key_raw"][step]) if keys is None else keys
        teachers, students = teachers.push(teacher), students.push(keys)
        queue = ref["teacher_queue"] if name == "1q_a" else ref["student_queue"]
        assert helpers.relative_error(teachers.vectors, ref["teacher_queue"][step]) < EXACT
        assert helpers.relative_error(students.vectors, queue[step]) < EXACT
        assert teachers.pointer == ref["pointer"][step]


def test_one_hot_targets_of_seed_are_info_nce_to_the_bit():
    rng = np.random.default_rng(0)
    student, teacher, queue = (
        l2_normalize(rng.normal(size=(n, 16)).astype("f")) for n in (8, 8, 64)
    )

    def seed(student, temperature):
        return losses.soft_cross_entropy(
            student, teacher, queue, student_temperature=0.2, teacher_temperature=temperature
        )

    def nce(student):
        return losses.info_nce(student, teacher, queue, temperature=0.2)

    np.testing.assert_array_equal(seed(student, 0.0), nce(student))
    gradient, expected = (jax.grad(lambda s, f=f: f(s).sum())(student) for f in (
        lambda s: seed(s, 1e-3), nce))  # fmt: skip
    # The gap to the second most similar row is above 0.1, so other targets are at most e^-100.
    np.testing.assert_allclose(seed(student, 1e-3), nce(student), rtol=1e-6)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_binary_contrast_is_the_sum_of_its_decisions():
    """Compares with the formula written with h, in float64."""
    rng = np.random.default_rng(0)
    student, teacher, queue = (
        l2_normalize(rng.normal(size=(n, 8)).astype("f")) for n in (5, 5, 12)
    )
    potential = losses.mean_potential(student, queue, temperature=0.07)
    loss = losses.binary_contrast(student, teacher, queue, temperature=0.07, potential=potential)
    s, t, q = (np.asarray(x, np.float64) for x in (student, teacher, queue))

    def h(similarity):
        e = np.exp(similarity / 0.07)
        return e / (e + 12 * np.exp(s @ q.T / 0.07).mean())

    expected = -np.log(h((s * t).sum(1))) - np.log(1 - h(s @ q.T)).sum(1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_bank_of_compress_starts_with_rows_of_length_one_on_average():
    vectors = Queue.uniform(jax.random.key(0), 4000, 16).vectors
    assert np.abs(vectors).max() <= (3 / 16) ** 0.5
    assert np.square(vectors).sum(axis=1).mean() == pytest.approx(1.0, rel=0.02)
