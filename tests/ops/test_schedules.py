"""Tests learning rates against the official scripts, epoch by epoch."""

import jax
import numpy as np
import pytest

import helpers
from disco_jax.ops import schedules
from disco_jax.train import optimizer
from disco_jax.train.optimizer import RateSettings

STEPS = 7  # per epoch


def rates(epochs, batch_size=256, **fields):
    """Returns the learning rate in the last step of every epoch."""
    spec = dict(
        decay="cosine", every="epoch", milestones=(), factor=0.1, warmup_epochs=0, warmup_from=0.0
    )
    schedule = optimizer.learning_rate(RateSettings(**spec | fields), batch_size, STEPS, epochs)
    return jax.vmap(schedule)(np.arange(epochs) * STEPS + STEPS - 1)


@pytest.mark.parametrize(
    "fixture, array, batch_size, fields",
    [
        ("moco_a", "moco_cos_200", 256, dict(base_lr=0.03)),
        ("moco_a", "moco_step_200", 256, dict(base_lr=0.03, decay="steps", milestones=(120, 160))),
        ("moco_a", "lincls_100", 256, dict(base_lr=30.0, decay="steps", milestones=(60, 80))),
        ("disco_a", "disco_cos_200", 256, dict(base_lr=0.03)),
        (
            "disco_a",
            "lincls_100",
            256,
            dict(
                base_lr=3.0,
                decay="steps",
                milestones=(5, 10, 15, 20, 25, 30, 35, 40, 45, 60, 80),
                factor=0.5,
            ),
        ),
        ("seed_a", "seed_cos_200", 256, dict(base_lr=0.03, warmup_epochs=5, warmup_from=0.03)),
        ("seed_a", "seed_cos_mult4", 1024, dict(base_lr=0.03, warmup_epochs=5, warmup_from=0.03)),
    ],
)
def test_matches_the_official_script(fixture, array, batch_size, fields):
    _, ref = helpers.fixture(f"schedules/{fixture}")
    expected = ref[array]
    np.testing.assert_allclose(rates(len(expected), batch_size, **fields), expected, rtol=1e-6)


def test_per_step_cosine_ends_near_zero_and_starts_at_the_peak():
    spec = RateSettings(base_lr=0.5, decay="cosine", every="step")
    schedule = optimizer.learning_rate(spec, 256, STEPS, 10)
    assert schedule(0) == pytest.approx(0.5)
    assert schedule(10 * STEPS) == pytest.approx(0, abs=1e-7)
    assert schedule(3) < schedule(2)


def test_unknown_names_are_refused_with_the_nearest():
    from disco_jax.errors import UserError

    spec = RateSettings(base_lr=0.5, decay="cosin", every="step")
    with pytest.raises(UserError, match="Did you mean 'cosine'"):
        optimizer.learning_rate(spec, 256, STEPS, 10)


@pytest.mark.parametrize("array", ["small", "no_warmup"])
def test_swavs_rate_step_by_step(array):
    meta, ref = helpers.fixture("schedules/swav_a")
    params = next(p for p in meta["params"] if p["array"] == array)
    per_epoch, epochs = params["iterations_per_epoch"], params["epochs"]
    spec = dict(
        base_lr=params["base_lr"],
        decay="cosine_after",
        every="step",
        minimum=params["final_lr"],
        warmup_epochs=params["warmup_epochs"],
        warmup_from=params["start_warmup"],
    )
    schedule = optimizer.learning_rate(RateSettings(**spec), 256, per_epoch, epochs)
    rate = jax.vmap(schedule)(np.arange(per_epoch * epochs))
    np.testing.assert_allclose(rate, ref[array], rtol=1e-5)


@pytest.mark.parametrize("array", ["lr", "momentum"])
def test_dinos_rate_and_ema_rate_step_by_step(array):
    meta, ref = helpers.fixture("schedules/dino_a")
    params = next(p for p in meta["params"] if p["array"] == array)
    steps = params["niter_per_ep"]
    schedule = schedules.cosine_after(
        params.get("start_warmup_value", 0.0),
        params["base_value"],
        params["final_value"],
        params.get("warmup_epochs", 0) * steps,
        params["epochs"] * steps,
    )
    values = jax.vmap(schedule)(np.arange(params["epochs"] * steps))
    np.testing.assert_allclose(values, ref[array], rtol=1e-6, atol=1e-9)


def test_end_points_of_the_cosine_after_a_warmup():
    schedule = schedules.cosine_after(0.1, 1.0, 0.01, 10, 50)
    values = [float(schedule(step)) for step in (0, 9, 10, 30, 50)]
    np.testing.assert_allclose(values, [0.1, 1.0, 1.0, 0.505, 0.01], rtol=1e-6)


def test_dinos_temperature_epoch_by_epoch():
    for name in ("a", "b"):
        meta, ref = helpers.fixture(f"losses/dino_{name}")
        params = meta["params"]
        schedule = schedules.line(
            params["warmup_teacher_temp"],
            params["teacher_temp"],
            params["warmup_teacher_temp_epochs"],
        )
        temperatures = jax.vmap(schedule)(np.arange(params["nepochs"]))
        np.testing.assert_allclose(temperatures, ref["teacher_temp"], rtol=1e-6)
    ramp = schedules.line(0.04, 0.07, 30)
    np.testing.assert_allclose([ramp(0), ramp(29), ramp(30), ramp(99)], [0.04, 0.07, 0.07, 0.07])
