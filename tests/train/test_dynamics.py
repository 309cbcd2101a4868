"""Whole training steps against the official `train()` functions, state by state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import helpers
from disco_jax.methods.base import Method, Views
from disco_jax.methods.contrast import Contrast
from disco_jax.methods.distill import Distill
from disco_jax.methods.relations import Relations
from disco_jax.models.encoder import Network
from disco_jax.ops import schedules
from disco_jax.ops.collectives import AXIS
from disco_jax.ops.memory import Queue
from disco_jax.train import optimizer
from disco_jax.train.state import TrainState
from disco_jax.train.step import make_train_step

STATE = 1e-4  # relative to the largest value of a tensor, after several steps


def build(meta, ref, objectives, hidden, teacher_hidden):
    """The step and the start of a recorded run."""
    settings = meta["params"]
    networks = {
        "student": Network(helpers.TinyEncoder(hidden, settings["dim"]), "local"),
        "momentum": Network(helpers.TinyEncoder(hidden, settings["dim"]), "local"),
        "teacher": Network(helpers.TinyEncoder(teacher_hidden, settings["dim"]), "local"),
    }
    method = Method(networks, objectives, Views((0, 1)))
    if "base_lr" in settings:  # one epoch a step
        rate = schedules.cosine(settings["base_lr"], settings["epochs"])
    else:
        rate = schedules.constant(settings["lr"])
    spec = dict(name="sgd", momentum=0.9, weight_decay=settings["weight_decay"])
    tx = optimizer.build(ConfigDict(spec), rate)
    step = make_train_step(
        method,
        helpers.Identity(),
        tx,
        learning_rate=rate,
        ema_rate=schedules.constant(settings["ema_momentum"]),
        seed=0,
    )
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
    """The step on `replicas` virtual replicas; vmap refuses outputs that differ between them."""
    step = jax.vmap(step, in_axes=(None, None, 0), out_axes=None, axis_name=AXIS)

    def run(state, frozen, images):
        views = {v: x.reshape(replicas, -1, x.shape[-1]) for v, x in enumerate(images)}
        return step(state, frozen, {"views": views, "aux": {}})

    return jax.jit(run)


def assert_variables(ours, ref, prefix):
    expected = helpers.tiny_variables(ref, prefix)
    flat = jax.tree_util.tree_leaves_with_path(expected)
    assert flat
    for path, value in flat:
        leaf = functools.reduce(lambda tree, key: tree[key.key], path, ours)
        assert helpers.relative_error(leaf, value) < STATE, (prefix, path)


@pytest.mark.parametrize(
    "name, objectives",
    [
        ("moco_train_steps_a", ("contrast",)),
        ("disco_train_steps_a", ("contrast", "distill")),
        ("disco_train_steps_only_mse", ("distill",)),
        # The official RKD script encodes the second view too and weighs its distance with 0.
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
            assert metrics["contrast/loss"] == pytest.approx(cross_entropy[i], rel=1e-4)
            assert_variables(state.momentum, ref, f"step{i}/encoder_k.")
            queue = state.memory["contrast"]["view_1"]
            assert helpers.relative_error(queue.vectors, ref[f"step{i}/queue"].T) < STATE
            assert queue.pointer == ref[f"step{i}/queue_ptr"][0]
        if "distill" in objectives:
            assert metrics["distill/loss"] == pytest.approx(ref["mse"][i].sum(), rel=1e-4)


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
        assert metrics["contrast/loss"] == pytest.approx(ref["loss_ce"][i].mean(), rel=1e-4)
