"""Complete training steps compared with recordings of the official `train()` functions."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax.methods.base import Method, Views
from disco_jax.methods.contrast import Contrast
from disco_jax.methods.regression import Distill
from disco_jax.methods.relations import Relations
from disco_jax.methods.self_distill import SelfDistill
from disco_jax.methods.swapped import Swapped
from disco_jax.models.encoder import Encoder, Network
from disco_jax.models.heads import ProjectionHead, Prototypes
from disco_jax.ops import schedules
from disco_jax.ops.collectives import AXIS
from disco_jax.ops.memory import Queue
from disco_jax.train import optimizer
from disco_jax.train.learner import Learner
from disco_jax.train.optimizer import OptimizerSettings
from disco_jax.train.state import TrainState
from disco_jax.train.step import make_train_step

STATE = 1e-5  # tolerance relative to the largest value of a tensor, after several steps


def build(meta, ref, objectives, hidden, teacher_hidden):
    """Builds the step, the initial state and the frozen variables of a recorded run."""
    settings = meta["params"]
    networks = {
        "student": Network(helpers.TinyEncoder(hidden, settings["dim"]), "local"),
        "momentum": Network(helpers.TinyEncoder(hidden, settings["dim"]), "local"),
        "teacher": Network(helpers.TinyEncoder(teacher_hidden, settings["dim"]), "local"),
    }
    method = Method(networks, objectives, Views((0, 1)))
    if "base_lr" in settings:  # the recording has one step per epoch
        rate = schedules.cosine(settings["base_lr"], settings["epochs"])
    else:
        rate = schedules.constant(settings["lr"])
    spec = dict(name="sgd", momentum=0.9, weight_decay=settings["weight_decay"])
    tx = optimizer.build(OptimizerSettings(**spec), rate)
    learner = Learner(
        method, tx, learning_rate=rate, ema_rate=schedules.constant(settings["ema_momentum"])
    )
    step = make_train_step(learner, helpers.Identity(), seed=0)
    student = helpers.tiny_variables(ref, "init/encoder_q.")
    queue = Queue(ref["init/queue"].T, np.int32(ref["init/queue_ptr"][0]))
    memory = {"contrast": {"view_1": queue}, "distill": (), "relations": ()}
    state = TrainState(
        step=jnp.int32(settings.get("first_epoch", 0)),
        student=student,
        momentum=helpers.tiny_variables(ref, "init/encoder_k.") if "contrast" in objectives else {},
        memory={name: memory[name] for name in objectives},
        opt_state=tx.init(student["params"]),
    )
    frozen = {"teacher": helpers.tiny_variables(ref, "init/teacher_encoder_q.")}
    return step, state, frozen if "distill" in objectives else {}


def replicated(step, replicas):
    """Maps the step over virtual replicas; vmap rejects outputs that differ between them."""
    step = jax.vmap(step, in_axes=(None, None, 0), out_axes=None, axis_name=AXIS)

    def run(state, frozen, images):
        views = {v: x.reshape(replicas, -1, x.shape[-1]) for v, x in enumerate(images)}
        return step(state, frozen, {"views": views, "aux": {}})

    return jax.jit(run)


def assert_variables(actual, ref, prefix):
    expected = helpers.tiny_variables(ref, prefix)
    flat = jax.tree_util.tree_leaves_with_path(expected)
    assert flat
    for path, value in flat:
        leaf = functools.reduce(lambda tree, key: tree[key.key], path, actual)
        assert helpers.relative_error(leaf, value) < STATE, (prefix, path)


@pytest.mark.parametrize(
    "name, objectives",
    [
        ("moco_train_steps_a", ("contrast",)),
        ("disco_train_steps_a", ("contrast", "distill")),
        ("disco_train_steps_only_mse", ("distill",)),
        # The official RKD script encodes the second view too, with weight 0 for its distance.
        ("rkd_train_steps_a", ("contrast", "relations", "distill")),
    ],
)
def test_states_follow_the_official_train_function(name, objectives):
    meta, ref = helpers.fixture(f"dynamics/{name}")
    settings = meta["params"]
    available = {
        "contrast": Contrast(
            temperature=settings["temperature"], queue_size=settings["queue_size"]
        ),
        "distill": Distill(weight=float("relations" not in objectives), reduction="sum"),
        "relations": Relations(),
    }
    step, state, frozen = build(
        meta,
        ref,
        {key: available[key] for key in objectives},
        settings["hidden"],
        settings.get("teacher_hidden", 0),
    )
    step = replicated(step, 1)
    cross_entropy = ref["loss" if objectives == ("contrast",) else "loss_ce"]
    for i in range(settings["steps"]):
        state, metrics = step(state, frozen, ref["images"][i])
        assert_variables(state.student, ref, f"step{i}/encoder_q.")
        assert metrics["learning_rate"] == pytest.approx(ref["lr"][i], rel=1e-5)
        if "contrast" in objectives:
            assert metrics["contrast/loss"] == pytest.approx(cross_entropy[i], rel=1e-5)
            assert_variables(state.momentum, ref, f"step{i}/encoder_k.")
            queue = state.memory["contrast"]["view_1"]
            assert helpers.relative_error(queue.vectors, ref[f"step{i}/queue"].T) < STATE
            assert queue.pointer == ref[f"step{i}/queue_ptr"][0]
        if "distill" in objectives:
            assert metrics["distill/loss"] == pytest.approx(ref["mse"][i].sum(), rel=1e-5)


@pytest.mark.parametrize(
    "distill",
    [Distill(weight=1.0, reduction="sum"), Distill(weight=4.0, reduction="mean")],
    ids=["sum over the device's batch", "weight 4 on the mean"],
)
def test_two_replicas_follow_two_official_processes(distill):
    meta, ref = helpers.fixture("dynamics/disco_two_processes_a")
    settings = meta["params"]
    contrast = Contrast(temperature=settings["temperature"], queue_size=settings["queue_size"])
    step, state, frozen = build(meta, ref, {"contrast": contrast, "distill": distill}, 0, 0)
    step = replicated(step, 2)
    for i in range(settings["steps"]):
        state, metrics = step(state, frozen, ref["images"][i])
        assert_variables(state.student, ref, f"step{i}/encoder_q.")
        assert_variables(state.momentum, ref, f"step{i}/encoder_k.")
        queue = state.memory["contrast"]["view_1"]
        assert helpers.relative_error(queue.vectors, ref[f"step{i}/queue"].T) < STATE
        assert metrics["contrast/loss"] == pytest.approx(ref["loss_ce"][i].mean(), rel=1e-5)


class Vectors(nn.Module):
    """The backbone of SwAV's recording, which returns its input."""

    def __call__(self, images, *, norm):
        return images


def swav_variables(ref, prefix, scaled=True):
    """Returns the encoder's variables of a recording.

    SwAV normalises prototypes at the start of a step, this package at the end.
    """
    prototypes = ref[f"{prefix}/prototypes.weight"].T
    if scaled:
        prototypes = prototypes / np.linalg.norm(prototypes, axis=0)
    out = {
        "kernel": ref[f"{prefix}/projection_head.weight"].T,
        "bias": ref[f"{prefix}/projection_head.bias"],
    }
    params = {"head": {"out": out}, "prototypes": {"kernel0": prototypes}}
    return {"params": params, "batch_stats": {}}


@pytest.mark.parametrize("replicas", [1, 2])
def test_swavs_states_follow_the_official_train_function(replicas):
    """Covers LARC, frozen and normalised prototypes and the queue, on one device and on two."""
    meta, ref = helpers.fixture("dynamics/swav_train_steps_a")
    settings = meta["params"]
    encoder = Encoder(
        Vectors(),
        ProjectionHead(0, settings["dim"], l2_normalized=True),
        prototypes=Prototypes((settings["prototypes"],)),
    )
    swapped = Swapped(
        temperature=settings["temperature"],
        epsilon=settings["epsilon"],
        queue_size=settings["queue_length"],
    )
    views = Views((0, 1), (2, 3))
    method = Method(
        {"student": Network(encoder, "sync", grouped=True)}, {"swapped": swapped}, views
    )
    rate = lambda step: jnp.asarray(ref["lr"], jnp.float32)[step]  # noqa: E731
    spec = dict(
        name="larc",
        momentum=0.9,
        weight_decay=settings["weight_decay"],
        frozen_until=("prototypes/*",),
        frozen_steps=settings["freeze_prototypes_niters"],
        unit_norm=("prototypes/kernel*",),
    )
    tx = optimizer.build(OptimizerSettings(**spec), rate)
    learner = Learner(method, tx, learning_rate=rate, ema_rate=schedules.constant(0.0))
    step = make_train_step(learner, helpers.Identity(), seed=0)
    step = replicated(step, replicas)
    student = swav_variables(ref, "init")
    queues = {f"view_{v}": Queue.empty(settings["queue_length"], settings["dim"]) for v in (0, 1)}
    state = TrainState(jnp.int32(0), student, {}, {"swapped": queues}, tx.init(student["params"]))
    for i in range(settings["iterations"]):
        state, metrics = step(state, {}, ref["images"][i])
        assert metrics["swapped/loss"] == pytest.approx(ref["loss"][i], rel=1e-5)
        expected = swav_variables(ref, f"step{i}")["params"]
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(state.student["params"]),
            jax.tree.leaves(expected),
            strict=True,
        ):
            assert helpers.relative_error(a, b) < STATE, (i, path)
        for v in (0, 1):
            vectors = state.memory["swapped"][f"view_{v}"].vectors
            rows = {tuple(np.round(row, 3)) for row in np.asarray(vectors)}
            assert rows == {tuple(np.round(row, 3)) for row in ref[f"step{i}/queue"][v]}


@pytest.mark.parametrize("follow_last", [False, True])
def test_when_the_momentum_network_follows(follow_last):
    """Checks that MoCo averages the student before the step, and DINO after the optimizer."""
    encoder = Encoder(Vectors(), ProjectionHead(0, 4), prototypes=Prototypes((6,), True))
    networks = {name: Network(encoder, "sync", grouped=True) for name in ("student", "momentum")}
    method = Method(networks, {"self_distill": SelfDistill()}, Views((0, 1)))
    rate = schedules.constant(0.5)
    tx = optimizer.build(OptimizerSettings(weight_decay=0.0), rate)
    learner = Learner(
        method, tx, learning_rate=rate, ema_rate=schedules.constant(0.75), follow_last=follow_last
    )
    step = make_train_step(learner, helpers.Identity(), seed=0)
    images = np.random.default_rng(0).normal(size=(2, 8, 5)).astype("f")
    start = encoder.init(jax.random.key(0), images[0], norm="sync")
    start = {"params": start["params"], "batch_stats": {}}
    other = jax.tree.map(lambda x: x + 1, start)
    memory = {"self_distill": jnp.zeros(6)}
    state = TrainState(jnp.int32(0), start, other, memory, tx.init(start["params"]))
    after, metrics = replicated(step, 2)(state, {}, images)
    followed = after.student if follow_last else start
    expected = jax.tree.map(lambda m, s: 0.75 * m + 0.25 * s, other, followed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after.momentum, expected)
    assert metrics["ema_rate"] == 0.75
    target = encoder.apply(other if follow_last else expected, images[0], norm="sync").scores
    centre = encoder.apply(other if follow_last else expected, images[1], norm="sync").scores
    np.testing.assert_allclose(
        after.memory["self_distill"],
        0.1 * np.mean(np.concatenate([target, centre]), axis=0),
        rtol=1e-4,
        atol=1e-6,
    )
