"""Tests that every loss gives equal results eagerly and compiled with its normalisation.

A compiler fuses operations. A value that is exactly 0, 1 or equal to another when each operation
rounds separately may differ when compiled. Each case runs on raw rows that the same program
normalises, as methods do: random rows, a batch with one image twice, rows that differ by a
hundredth (a collapsing network), and a batch with a row of zeros.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax.methods import base
from disco_jax.ops import augment, losses, mixing, queues, relations, schedules, sinkhorn
from disco_jax.ops.collectives import AXIS
from disco_jax.ops.vectors import l2_normalize
from disco_jax.train import health

B, D, K = 8, 16, 40
LOSS, GRADIENT = 1e-5, 1e-4  # relative to the largest value
HALF = jnp.bfloat16


def rows(seed, count=B, dim=D):
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


KEY, QUEUE, SCORES = rows(1), np.asarray(l2_normalize(rows(2, K))), rows(3, B, 10)
LABELS = np.arange(B, dtype=np.int32) % 10
CENTRE = rows(4, 1, D)[0]


def maps(student):
    return student.reshape(B, 4, 4, 1)


def queue_pair(loss):
    return lambda s: loss(
        l2_normalize(s),
        l2_normalize(KEY),
        QUEUE,
        QUEUE,
        student_temperature=0.1,
        target_temperature=0.04,
    )


def seed(temperature, reading=queues.DEFAULT_ACCESS):
    return lambda s: losses.soft_cross_entropy(
        l2_normalize(s), l2_normalize(KEY), QUEUE, student_temperature=0.2,
        teacher_temperature=temperature, reading=reading,
    )  # fmt: skip


def nce(reading=queues.DEFAULT_ACCESS, temperature=0.2):
    return lambda s: losses.info_nce(
        l2_normalize(s), l2_normalize(KEY), QUEUE, temperature=temperature, reading=reading
    )


FORMULA = queues.QueueAccess(one_pass=False)
# name -> function of raw rows f32[B, D]. The name before ":" is that of the public function.
LOSSES = {
    "info_nce": nce(),
    "info_nce:cold": nce(temperature=0.01),
    "info_nce:formula": nce(FORMULA),
    "info_nce_beside": lambda s: losses.info_nce_beside(
        l2_normalize(s), l2_normalize(KEY), jnp.full(B, 3.0), temperature=0.2
    ),
    "soft_cross_entropy": seed(0.01),
    "soft_cross_entropy:one-hot": seed(0.0),
    "soft_cross_entropy:code": seed(1e-4),
    "soft_cross_entropy:formula": seed(0.01, FORMULA),
    "binary_contrast": lambda s: losses.binary_contrast(
        l2_normalize(s),
        l2_normalize(KEY),
        QUEUE,
        temperature=0.07,
        potential=losses.mean_potential(l2_normalize(s), QUEUE, temperature=0.07),
    ),
    "mean_potential": lambda s: losses.mean_potential(l2_normalize(s), QUEUE, temperature=0.07),
    "softened_cross_entropy": lambda s: losses.softened_cross_entropy(
        s[:, :10], SCORES, LABELS, alpha=0.5, temperature=2.0
    ),
    "class_cross_entropy": lambda s: losses.class_cross_entropy(s[:, :10], LABELS),
    "squared_distance": lambda s: losses.squared_distance(l2_normalize(s), l2_normalize(KEY)),
    "squared_distance:itself": lambda s: losses.squared_distance(
        l2_normalize(s), l2_normalize(jax.lax.stop_gradient(s))
    ),
    "cross_correlation_loss": lambda s: losses.cross_correlation_loss(s, KEY, redundancy=5e-3),
    "target_cross_entropy": lambda s: losses.target_cross_entropy(
        jax.nn.softmax(KEY), l2_normalize(s), temperature=0.1
    ),
    "sharpened": lambda s: losses.target_cross_entropy(
        losses.sharpened(s, CENTRE, 0.04), l2_normalize(s), temperature=0.1
    ),
    "rebalanced": lambda s: losses.rebalanced(
        [jnp.mean(losses.squared_distance(l2_normalize(s), l2_normalize(KEY)))],
        [jnp.mean(l2_normalize(s) ** 2)],
        0.4,
    ),
    "l2_normalize": lambda s: l2_normalize(s) @ CENTRE,
    "rkd_distance": lambda s: relations.rkd_distance(l2_normalize(s), l2_normalize(KEY)),
    "rkd_angle": lambda s: relations.rkd_angle(l2_normalize(s), l2_normalize(KEY)),
    "bank_cross_entropy": queue_pair(relations.bank_cross_entropy),
    "bank_divergence": queue_pair(relations.bank_divergence),
    "attention": lambda s: jnp.square(relations.attention(maps(s), (2, 2))) @ CENTRE[:4],
    "attention_distance": lambda s: relations.attention_distance(maps(s), maps(KEY)),
    "queue_logsumexp": lambda s: (
        queues.queue_logsumexp(l2_normalize(s), QUEUE, temperature=0.2).total
    ),
    "queue_logsumexp_of_each": lambda s: (
        queues.queue_logsumexp_of_each(
            {0: l2_normalize(s), 1: l2_normalize(KEY)}, QUEUE, temperature=0.2
        )[0].total
    ),
    "queue_attention": lambda s: losses.squared_distance(
        l2_normalize(s), queues.queue_attention(l2_normalize(s), QUEUE, temperature=0.04)
    ),
    "sinkhorn": lambda s: losses.target_cross_entropy(
        sinkhorn.sinkhorn(l2_normalize(s), epsilon=0.05, iterations=3),
        l2_normalize(s),
        temperature=0.1,
    ),
}
MEASURES = {  # functions without a gradient
    "contrast_accuracy": lambda s: losses.contrast_accuracy(
        l2_normalize(s),
        l2_normalize(s),
        queues.queue_logsumexp(l2_normalize(s[::-1]), l2_normalize(s), temperature=0.2).nearest,
    ),
    "nearest": lambda s: queues.nearest(l2_normalize(s), QUEUE),
    "prototype_perplexity": lambda s: base.prototype_perplexity(l2_normalize(s), 0.1),
    "spread": lambda s: base.embedding_std(l2_normalize(s)),
    "uniformity": lambda s: health._uniformity(l2_normalize(s)),
}
SETS = ("random", "twice", "collapsed", "zero")


def inputs(kind):
    student = rows(0)
    if kind == "twice":
        student[5] = student[2]
    if kind == "collapsed":
        student = student[:1] + 1e-2 * student
    if kind == "zero":
        student[3] = 0
    return student


def on_one_replica(function):
    """Maps a function over a single replica, so that collectives work."""
    return lambda s: jax.vmap(function, axis_name=AXIS)(s[None])[0]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_are_the_same_compiled_as_eagerly(name):
    loss = on_one_replica(LOSSES[name])
    both = jax.value_and_grad(lambda s: jnp.mean(loss(s)))
    compiled_both = jax.jit(both)
    for kind in SETS:
        student = inputs(kind)
        (eager, to_eager), (compiled, to_compiled) = both(student), compiled_both(student)
        error = abs(float(eager) - float(compiled)) / max(abs(float(eager)), 1e-3)
        gradient = np.abs(to_eager - to_compiled).max() / max(np.abs(to_eager).max(), 1e-3)
        print(f"{name:28} {kind:10} {eager:12.6f} {compiled:12.6f} {error:8.1e} {gradient:8.1e}")
        assert error < LOSS, kind
        assert gradient < GRADIENT, kind


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_is_the_same_compiled_as_eagerly(name):
    measure = on_one_replica(MEASURES[name])
    compiled = jax.jit(measure)
    kinds = ("random", "twice") if name == "nearest" else SETS  # of equal rows, either may win
    for kind in kinds:
        student = inputs(kind)
        np.testing.assert_allclose(compiled(student), measure(student), rtol=1e-5, atol=1e-3)


def test_a_collapsed_network_finds_no_key_among_equals():
    """The own and the largest product are both 1, but summed in different orders."""
    accuracy = jax.jit(MEASURES["contrast_accuracy"])
    for width in (1e-9, 0.0):
        student = np.ones((B, D), np.float32) + width * rows(0)
        np.testing.assert_array_equal(accuracy(student), 0)


def test_no_public_function_of_these_modules_is_missing_here():
    covered = {name.partition(":")[0] for name in (*LOSSES, *MEASURES)}
    for module in (losses, relations, queues, sinkhorn):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                assert name in covered, name


IMAGES = {
    "brightness": lambda x, f: augment.brightness(x, f),
    "contrast": lambda x, f: augment.contrast(x, f),
    "saturation": lambda x, f: augment.saturation(x, f),
    "hue": lambda x, f: augment.hue(augment.saturation(x, f), f - 1),
    "grayscale": lambda x, f: augment.hue(augment.grayscale(x, f > 0.9), f - 1),
    "solarize": lambda x, f: augment.solarize(x, f > 0.9),
    "flip": lambda x, f: augment.flip(x, f > 0.9),
    "gaussian_blur": lambda x, f: augment.gaussian_blur(x, f),
    "jitter": lambda x, f: augment.jitter(
        x, jnp.stack([f, f, f, f - 1], 1), jnp.arange(4, dtype=jnp.int32)
    ),
    "normalize": lambda x, f: augment.normalize(x, (0.5, 0.4, 0.3), (0.2, 0.3, 0.2)),
    "cutmix": lambda x, f: mixing.cutmix(
        x, x[::-1], f[0] / 2, jnp.array([3, 4], jnp.int32)
    )[0],
    "draw_box": lambda x, f: mixing.draw_box(jax.random.key(0), 9, 9)[0],
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_operation_is_the_same_compiled_as_eagerly(name):
    """Includes colours with two or three equal channels, where the hue is not differentiable."""
    images = np.random.default_rng(0).integers(0, 3, (4, 9, 9, 3)).astype(np.float32) / 2
    factors = np.asarray([0.5, 0.8, 1.0, 1.3], np.float32)
    eager, compiled = (f(images, factors) for f in (IMAGES[name], jax.jit(IMAGES[name])))
    np.testing.assert_allclose(compiled, eager, atol=2e-6)


def test_no_image_operation_is_missing_here():
    for module in (augment, mixing):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                assert name in IMAGES, name


SCHEDULES = {
    "constant": schedules.constant(0.3),
    "per_epoch": schedules.per_epoch(schedules.cosine(0.3, 49), 7),
    "cosine": schedules.cosine(0.3, 49),
    "steps": schedules.steps(0.3, [14, 30], 0.1),
    "warmup": schedules.warmup(schedules.cosine(0.3, 49), 0.01, 0.3, 7),
    "cosine_after": schedules.cosine_after(0.01, 0.3, 1e-4, 7, 49),
    "line": schedules.line(0.04, 0.07, 11),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_the_same_compiled_as_eagerly(name):
    compiled = jax.jit(jax.vmap(SCHEDULES[name]))(jnp.arange(50))
    eager = [SCHEDULES[name](jnp.int32(step)) for step in range(50)]
    np.testing.assert_allclose(compiled, eager, rtol=1e-5, atol=1e-8)


def test_no_schedule_is_missing_here():
    for name, function in inspect.getmembers(schedules, inspect.isfunction):
        if function.__module__ == schedules.__name__ and not name.startswith("_"):
            assert name in SCHEDULES, name


READ_IN_HALF = {  # losses that accelerators compute with bfloat16 factors
    "info_nce": nce(queues.QueueAccess(dtype=HALF)),
    "soft_cross_entropy": seed(0.01, queues.QueueAccess(dtype=HALF)),
    "attention_distance": lambda s: relations.attention_distance(
        maps(s).astype(HALF), maps(KEY).astype(HALF)
    ),
}


@pytest.mark.parametrize("name", READ_IN_HALF)
def test_a_loss_that_reads_bfloat16_is_close_to_that_in_float32_compiled(name):
    half, full = (
        jax.jit(jax.value_and_grad(lambda s, loss=loss: jnp.mean(loss(s))))(inputs("random"))
        for loss in (READ_IN_HALF[name], LOSSES[name])
    )
    assert half[0] == pytest.approx(float(full[0]), rel=1e-2)
    assert helpers.relative_error(half[1], full[1]) < 2e-2
