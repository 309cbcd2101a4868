"""Tests losses, gradients and memories of SwAV, DINO and SSLight against the official code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax.methods.base import Record, Views
from disco_jax.methods.contrast import Contrast
from disco_jax.methods.regression import Distill
from disco_jax.methods.self_distill import SelfDistill
from disco_jax.methods.swapped import Swapped
from disco_jax.models.encoder import Encoded
from disco_jax.ops.collectives import AXIS
from disco_jax.ops.losses import info_nce, rebalanced
from disco_jax.ops.memory import Queue
from disco_jax.ops.vectors import l2_normalize

LOSS, GRADIENT, MEMORY = 1e-5, 1e-5, 1e-5


def views_of(counts):
    """Returns `Views` for (number of global views, number of local views)."""
    global_count, local_count = counts
    numbers = tuple(range(global_count + local_count))
    return Views(numbers[:global_count], numbers[global_count:])


def swav_record(raw, prototypes, views, teacher=None):
    """Builds a record of embeddings `raw`, f32[views, B, D], scored on prototypes f32[K, D]."""
    dot = lambda rows, kernel: jnp.dot(rows, kernel.T, precision="highest")  # noqa: E731
    student = {}
    for view in range(len(raw)):
        rows = l2_normalize(raw[view])
        student[view] = Encoded(rows, rows, dot(rows, prototypes))
    encoded = {"student": student}
    if teacher is not None:
        encoded["teacher"] = {v: Encoded(rows, rows) for v, rows in enumerate(teacher)}
    constant = jax.lax.stop_gradient(prototypes)
    return Record(encoded, {}, views, {"student": lambda rows: dot(rows, constant)})


def newest_first(queue):
    """Returns a ring buffer's rows in the order of the official queue."""
    return np.roll(np.asarray(queue.vectors), -int(queue.pointer), axis=0)


def blocks(rows, size):
    """Reverses the order of blocks; the official queue preserves the order inside a push."""
    return np.concatenate(np.split(rows, len(rows) // size)[::-1])


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize(
    "name, share",
    [("swav_a", -1.0), ("swav_queue_a", -1.0), ("sslight_swav_a", 0.4)],
)
def test_swav_follows_the_official_code_on_any_number_of_devices(name, share, replicas):
    meta, ref = helpers.fixture(f"losses/{name}")
    settings = meta["params"]
    views, batch = views_of(settings["nmb_crops"]), settings["batch"]
    objective = Swapped(
        temperature=settings["temperature"],
        epsilon=settings["epsilon"],
        iterations=settings["sinkhorn_iterations"],
        queue_size=settings["queue_length"],
        global_share=share,
    )
    prototypes = ref.get("prototypes_normalised", ref.get("prototypes"))
    memory = {}
    if settings["queue_length"]:
        memory = {
            f"view_{v}": Queue.empty(settings["queue_length"], settings["dim"]) for v in (0, 1)
        }

    def loss(raw, prototypes, memory):
        term = objective(swav_record(raw, prototypes, views), memory, jnp.int32(0))
        return term.loss, term

    step = jax.vmap(
        lambda raw, memory: jax.value_and_grad(loss, (0, 1), has_aux=True)(raw, prototypes, memory),
        in_axes=(1, None),
        axis_name=AXIS,
    )
    step = jax.jit(step)
    for i, raw in enumerate(ref["raw"]):
        split = raw.reshape(len(raw), replicas, batch // replicas, -1)
        (value, term), (to_raw, to_prototypes) = step(split, memory)
        assert helpers.relative_error(jnp.mean(value), ref["loss"][i]) < LOSS
        to_raw = jnp.swapaxes(to_raw, 0, 1).reshape(raw.shape) / replicas
        assert helpers.relative_error(to_raw, ref["grad_raw"][i]) < GRADIENT
        if "grad_prototypes" in ref:
            gradient = jnp.mean(to_prototypes, axis=0)
            assert helpers.relative_error(gradient, ref["grad_prototypes"][i]) < GRADIENT
        memory = jax.tree.map(lambda x: x[0], term.memory)
        if memory:
            assert term.metrics["queue_full"][0] == ref["queue_used"][i].all()
            for v in (0, 1):
                rows = blocks(newest_first(memory[f"view_{v}"]), batch)
                assert helpers.relative_error(rows, ref["queue"][i][v]) < MEMORY


def test_disco_on_swav_follows_the_official_code():
    """Disagreement W1: half the mean over elements of (unit student - raw teacher)^2."""
    meta, ref = helpers.fixture("losses/disco_swav_a")
    settings = meta["params"]
    views = views_of(settings["nmb_crops"])
    every = (*views.globals, *views.locals)
    swapped = Swapped(epsilon=settings["epsilon"], temperature=settings["temperature"])
    weight = 0.5 / (settings["dim"] * len(every))
    distill = Distill(weight=weight, views=every, teacher_unit=False)

    def loss(raw, prototypes):
        record = swav_record(raw, prototypes, views, ref["teacher_raw"][0])
        terms = swapped(record, {}, jnp.int32(0)), distill(record, (), jnp.int32(0))
        return terms[0].loss + weight * terms[1].loss

    value, grads = helpers.single(
        jax.value_and_grad(loss, (0, 1)), ref["raw"][0], ref["prototypes_normalised"]
    )
    assert helpers.relative_error(value, ref["loss"][0]) < LOSS
    assert helpers.relative_error(grads[0], ref["grad_raw"][0]) < GRADIENT
    assert helpers.relative_error(grads[1], ref["grad_prototypes"][0]) < GRADIENT


def dino_record(student, teacher, views):
    encoded = {
        name: {v: Encoded(rows, rows, rows) for v, rows in enumerate(batch)}
        for name, batch in (("student", student), ("momentum", teacher))
    }
    return Record(encoded, {}, views)


@pytest.mark.parametrize(
    "name, replicas",
    [("dino_a", 1), ("dino_a", 4), ("dino_b", 1), ("dino_b", 3), ("sslight_dino_a", 4)],
)
def test_dino_follows_the_official_code_on_any_number_of_devices(name, replicas):
    meta, ref = helpers.fixture(f"losses/{name}")
    settings = meta["params"]
    batch, dim = settings["batch"], settings["out_dim"]
    if name == "sslight_dino_a":
        views, share = views_of(settings["nmb_crops"]), settings["lambdas"][0]
        warm, last, epochs = settings["teacher_temp"][0], settings["teacher_temp"][1], 2
    else:
        views, share = views_of((2, settings["ncrops"] - 2)), -1.0
        warm, last = settings["warmup_teacher_temp"], settings["teacher_temp"]
        epochs = settings["warmup_teacher_temp_epochs"]
    objective = SelfDistill(
        student_temperature=settings["student_temp"],
        momentum_temperature=last,
        warmup_temperature=warm,
        warmup_epochs=epochs,
        centre_rate=settings["center_momentum"],
        global_share=share,
    )

    def loss(student, teacher, centre, step):
        term = objective(dino_record(student, teacher, views), centre, step)
        return term.loss, term.memory

    grad = jax.value_and_grad(loss, has_aux=True)
    grad = jax.jit(jax.vmap(grad, in_axes=(1, 1, None, None), axis_name=AXIS))
    centre = jnp.zeros(dim)
    for i in range(len(ref["loss"])):
        student = ref["student"][i].reshape(-1, replicas, batch // replicas, dim)
        teacher = ref["teacher"][i].reshape(2, replicas, batch // replicas, dim)
        (value, centres), to_student = grad(student, teacher, centre, jnp.int32(i))
        assert helpers.relative_error(jnp.mean(value), ref["loss"][i]) < LOSS
        to_student = jnp.swapaxes(to_student, 0, 1).reshape(ref["grad_student"][i].shape) / replicas
        assert helpers.relative_error(to_student, ref["grad_student"][i]) < GRADIENT
        centre = centres[0]
        np.testing.assert_array_equal(centres[-1], centre)
        assert helpers.relative_error(centre, ref["center"][i][0]) < MEMORY


def test_sslights_contrast_follows_the_official_code():
    meta, ref = helpers.fixture("losses/sslight_moco_a")
    batch = meta["params"]["batch"]

    def loss(logits):
        losses = jax.nn.logsumexp(logits, axis=-1) - logits[:, 0]
        first, *others = [jnp.mean(rows) for rows in jnp.split(losses, len(losses) // batch)]
        return rebalanced([first], others, meta["params"]["lambdas"][0])

    value, grad = jax.value_and_grad(loss)(ref["logits"])
    assert helpers.relative_error(value, ref["loss"]) < LOSS
    assert helpers.relative_error(grad, ref["grad_logits"]) < GRADIENT


@pytest.mark.parametrize("share, weights", [(0.4, (0.4, 0.3, 0.3)), (-1.0, (1 / 3,) * 3)])
def test_local_views_are_queries_for_the_one_global_key(share, weights):
    rng = np.random.default_rng(0)
    rows = [l2_normalize(rng.normal(size=(4, 8)).astype("f")) for _ in range(4)]
    encoded = {
        "student": {v: Encoded(rows[v], rows[v]) for v in (1, 2, 3)},
        "momentum": {0: Encoded(rows[0], rows[0])},
    }
    views = Views((0, 1), (2, 3))
    objective = Contrast(
        pairs=((1, 0),), queue_size=8, queue_init="random", local_queries=True, global_share=share
    )
    assert objective.needs(views) == {"student": (1, 2, 3), "momentum": (0, 0, 0)}
    record = Record(encoded, {}, views)
    memory = objective.init(jax.random.key(0), record, None)
    run = jax.vmap(lambda memory: objective(record, memory, jnp.int32(0)), axis_name=AXIS)
    memory_of_replica = jax.tree.map(lambda x: x[None], memory)
    term = jax.tree.map(lambda x: x[0], jax.jit(run)(memory_of_replica))
    queue = memory["view_0"].vectors
    losses = [jnp.mean(info_nce(rows[v], rows[0], queue, temperature=0.2)) for v in (1, 2, 3)]
    np.testing.assert_allclose(term.loss, np.dot(weights, losses), rtol=1e-6)
    assert set(term.memory) == {"view_0"} and term.memory["view_0"].pointer == 4


def test_the_queue_fills_from_its_epoch_on_and_is_read_when_full():
    rng = np.random.default_rng(0)
    objective = Swapped(queue_size=8, queue_epochs=2, steps_per_epoch=3)
    prototypes = l2_normalize(rng.normal(size=(6, 5)).astype("f"))
    memory = {f"view_{v}": Queue.empty(8, 5) for v in (0, 1)}

    def evaluate(raw, memory, step):
        return objective(swav_record(raw, prototypes, Views((0, 1))), memory, jnp.int32(step))

    filled, used = [], []
    for step in range(9):
        raw = rng.normal(size=(2, 4, 5)).astype("f")
        term = helpers.single(evaluate, raw, memory, step)
        memory = term.memory
        used.append(float(term.metrics["queue_full"]))
        filled.append(int(np.any(np.asarray(memory["view_0"].vectors) != 0, axis=1).sum()))
    assert filled == [0, 0, 0, 0, 0, 0, 4, 8, 8]
    assert used == [0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_temperature_of_the_targets_changes_once_an_epoch():
    objective = SelfDistill(momentum_temperature=0.07, warmup_epochs=4, steps_per_epoch=10)
    steps = 0, 9, 10, 30, 39, 40, 400
    temperatures = [float(objective.temperature_at(jnp.int32(step))) for step in steps]
    np.testing.assert_allclose(temperatures, [0.04, 0.04, 0.05, 0.07, 0.07, 0.07, 0.07], rtol=1e-6)
