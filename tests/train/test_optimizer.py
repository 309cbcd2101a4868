"""Optimizers compared with three recorded steps of the official ones, and frozen parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from disco_jax.errors import UserError
from disco_jax.ops import schedules
from disco_jax.train import optimizer

STEP = 1e-5


def halved(rate):
    """Returns a schedule that halves the rate before the second step, as the recordings do."""
    return lambda step: jnp.where(step < 1, rate, rate / 2)


def build(rate=None, steps_per_epoch=1, total_epochs=1, **spec):
    spec = dict(name="sgd", momentum=0.9, weight_decay=0.0) | spec
    rate = rate or schedules.constant(0.1)
    return optimizer.build(optimizer.OptimizerSettings(**spec), rate, steps_per_epoch, total_epochs)


def recorded(ref, prefix):
    """Returns the parameters or gradients of a recording in Flax's layout."""
    arrays = {k: ref[f"{prefix}/{k}"] for k in ("dense", "bias", "depthwise", "zero")}
    return arrays | {"depthwise": arrays["depthwise"].transpose(2, 3, 1, 0)}


@pytest.mark.parametrize(
    "name, spec",
    [
        ("larc_swav_a", dict(name="larc")),
        ("lars_dino_a", dict(name="lars", no_decay=("vectors",), no_trust=("vectors",))),
        ("lars_sslight_a", dict(name="lars", no_decay=("vectors",), no_trust=("vectors",))),
        ("adamw_a", dict(name="adamw")),
        ("sgd_a", dict(name="sgd")),
    ],
)
def test_three_steps_follow_the_official_optimizer(name, spec):
    meta, ref = helpers.fixture(f"dynamics/{name}")
    settings = meta["params"]
    spec = {"weight_decay": settings["weight_decay"], **spec}
    tx = build(halved(settings["lr"]), **spec)
    params = recorded(ref, "init")
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(3):
        updates, state = update(recorded(ref, f"grad{i}"), state, params)
        params = optax.apply_updates(params, updates)
        for key, expected in recorded(ref, f"step{i}").items():
            np.testing.assert_allclose(params[key], expected, atol=STEP * np.abs(expected).max())


def test_kinds_of_parameters_are_left_out_of_decay_and_trust():
    """Zero gradients leave only weight decay; covers disagreement L2 (depthwise kernels)."""
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 4, 4))},
        "depthwise": {"kernel": jnp.ones((3, 3, 1, 4)), "bias": jnp.ones(4)},
        "prototypes": {"scale0": jnp.ones(4)},
    }
    tx = build(weight_decay=0.1, no_decay=("vectors", "depthwise"), momentum=0.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    moved = jax.tree.map(lambda x: bool(jnp.any(x != 0)), updates)
    assert moved == {
        "conv": {"kernel": True},
        "depthwise": {"kernel": False, "bias": False},
        "prototypes": {"scale0": True},  # it has two axes in PyTorch
    }
    gradients = jax.tree.map(jnp.ones_like, params)
    sizes = {}
    for kinds in (("vectors",), ("vectors", "depthwise")):
        tx = build(name="lars", no_trust=kinds, momentum=0.0)
        updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
        sizes[kinds] = float(-updates["depthwise"]["kernel"].ravel()[0])
        assert updates["depthwise"]["bias"][0] == pytest.approx(-0.1)
    assert sizes["vectors",] == pytest.approx(1e-4)  # the rate times eta
    assert sizes["vectors", "depthwise"] == pytest.approx(0.1)


def test_clipping_takes_every_parameter_on_its_own():
    meta, ref = helpers.fixture("dynamics/dino_clip_a")
    grads = {k.removeprefix("grad_"): v for k, v in ref.items() if k.startswith("grad_")}
    tx = build(schedules.constant(1.0), clip=meta["params"]["clip"], momentum=0.0)
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads), grads)
    for key, update in updates.items():
        assert helpers.relative_error(-update, ref[f"clipped_{key}"]) < STEP


def run(tx, params, gradients):
    """Returns the parameters after each step on the given gradients."""
    state, history, update = tx.init(params), [], jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history


@pytest.mark.parametrize("name", ["sgd", "larc", "lars", "adamw"])
def test_frozen_parameters_start_late_as_if_nothing_had_been(name):
    """PyTorch skips parameters without a gradient: no moments, no decay, no step count."""
    rng = np.random.default_rng(0)
    draw = lambda: {  # noqa: E731
        "head": {"kernel": rng.normal(size=(3, 4)).astype("f")},
        "prototypes": {"kernel0": rng.normal(size=(4, 5)).astype("f")},
    }
    params, gradients = draw(), [draw() for _ in range(5)]
    rate = lambda step: 0.1 / (1 + jnp.asarray(step, jnp.float32))  # noqa: E731
    spec = dict(name=name, weight_decay=0.01)
    delayed = run(
        build(rate, frozen_until=("prototypes/*",), frozen_steps=2, **spec), params, gradients
    )
    plain = run(build(rate, **spec), params, gradients)
    for step in range(5):
        assert_equal(delayed[step]["head"], plain[step]["head"])
    for step in (0, 1):
        np.testing.assert_array_equal(
            delayed[step]["prototypes"]["kernel0"], params["prototypes"]["kernel0"]
        )
    late = run(build(lambda step: rate(step + 2), **spec), params, gradients[2:])
    assert_equal(delayed[-1]["prototypes"], late[-1]["prototypes"])


def assert_equal(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-8), actual, expected
    )


def test_fixed_parameters_never_move_and_prototypes_keep_unit_length():
    rng = np.random.default_rng(1)
    params = {
        "prototypes": {
            "kernel0": rng.normal(size=(4, 5)).astype("f"),
            "scale0": np.ones(5, np.float32),
        }
    }
    gradients = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f"), params)] * 2
    tx = build(frozen=("prototypes/scale*",), unit_norm=("prototypes/kernel*",), weight_decay=0.1)
    prototypes = run(tx, params, gradients)[-1]["prototypes"]
    np.testing.assert_array_equal(prototypes["scale0"], 1)
    np.testing.assert_allclose(np.linalg.norm(prototypes["kernel0"], axis=0), 1, atol=1e-6)


def test_weight_decay_follows_the_cosine_of_dino():
    _, ref = helpers.fixture("schedules/dino_a")
    params = {"kernel": np.full((1, 1), 1.0, np.float32)}
    tx = build(
        schedules.constant(1.0),
        steps_per_epoch=9,
        total_epochs=12,
        momentum=0.0,
        weight_decay=0.04,
        weight_decay_end=0.4,
    )
    state, decays, update = tx.init(params), [], jax.jit(tx.update)
    zero = {"kernel": np.zeros((1, 1), np.float32)}
    for _ in range(108):
        updates, state = update(zero, state, params)
        decays.append(-float(updates["kernel"][0, 0]))
    np.testing.assert_allclose(decays, ref["wd"], atol=1e-6)


def test_state_of_plain_sgd_is_what_it_was():
    """Its structure must not change, so that runs of earlier versions can resume."""
    params = {"kernel": jnp.ones((2, 2))}
    state = build(weight_decay=1e-4).init(params)
    assert len(jax.tree.leaves(state)) == 2  # the velocity and the step count of the schedule


@pytest.mark.parametrize(
    "spec, message",
    [
        (dict(name="adam"), "Did you mean 'adamw'"),
        (dict(no_decay=("vector",)), "Did you mean 'vectors'"),
        (dict(no_trust=("depth",)), r"config\.optimizer\.no_trust='depth'"),
        (
            dict(frozen_until=("head",), frozen_steps=2),
            r"frozen_until=\('head',\): 'head' matches no",
        ),
        (dict(unit_norm=("prototypes/*",)), "unit_norm"),
        (dict(frozen_steps=2, frozen_epochs=1), "both set the duration"),
        (dict(name="larc", weight_decay_end=0.4), "use 'lars'"),
    ],
)
def test_mistakes(spec, message):
    params = {"backbone": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(UserError, match=message):
        tx = build(**spec)
        tx.update(params, tx.init(params), params)
