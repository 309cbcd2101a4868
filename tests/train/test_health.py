"""Label-free health signals of a run, and the alarm for a collapsed embedding."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax.data.arrays import ArraySource
from disco_jax.errors import NumericError
from disco_jax.methods.base import Record
from disco_jax.models.encoder import Encoded
from disco_jax.ops.collectives import AXIS
from disco_jax.ops.memory import Queue
from disco_jax.ops.vectors import l2_normalize
from disco_jax.train import health, teacher
from disco_jax.train.run_settings import HealthSettings
from disco_jax.workflows import pretrain


def measured(encoded, memory=None, step=0, replicas=1):
    """Computes the signals of {(network, view): f32[B, D]} on virtual replicas."""

    def one(rows):
        networks = {}
        for (network, view), x in rows.items():
            networks.setdefault(network, {})[view] = Encoded(x, x)
        return health.signals(Record(networks, {}), memory or {}, jnp.int32(step))

    split = {k: jnp.asarray(x).reshape(replicas, -1, x.shape[-1]) for k, x in encoded.items()}
    signals = jax.vmap(one, axis_name=AXIS)(split)
    return {k.removeprefix("health/"): np.asarray(v).mean(0) for k, v in signals.items()}


def rows(seed, count=32, dim=16):
    return np.random.default_rng(seed).normal(size=(count, dim)).astype("f")


@pytest.mark.parametrize("replicas", [1, 4])
def test_signals_are_their_definitions(replicas):
    student, teacher = rows(0), rows(1)
    bank = Queue.create(jax.random.key(0), 64, 16)
    encoded = {("student", 0): student, ("teacher", 0): teacher}
    signals = measured(encoded, {"similarity": {"view_0": bank}}, 1, replicas)
    s, t = (np.asarray(l2_normalize(x), np.float64) for x in (student, teacher))
    assert signals["std"] == pytest.approx(np.sqrt(16 * s.var(axis=0).mean()), rel=1e-5)
    distances = ((s[:, None] - s[None]) ** 2).sum(-1)[~np.eye(32, dtype=bool)]
    assert signals["uniformity"] == pytest.approx(np.log(np.exp(-2 * distances).mean()), rel=1e-4)
    assert signals["alignment"] == pytest.approx(((s - t) ** 2).sum(1).mean(), rel=1e-5)
    picks = [np.argmax(x @ np.asarray(bank.vectors).T, axis=1) for x in (s, t)]
    assert signals["agreement"] == pytest.approx((picks[0] == picks[1]).mean())
    assert signals["queue_age"] == 1  # of at most 64 / 32
    values = np.linalg.svd(student.astype(np.float64), compute_uv=False)
    shares = values / values.sum()
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert health.effective_rank(signals["rank"]) == pytest.approx(expected, rel=1e-4)


def test_signals_of_what_follows_and_of_what_collapsed():
    teacher, bank = rows(1), Queue.create(jax.random.key(0), 64, 16)
    same = measured({("student", 0): teacher, ("teacher", 0): teacher}, {"x": bank}, 9)
    assert same["agreement"] == 1 and same["alignment"] < 1e-6 and same["queue_age"] == 2
    constant = measured({("student", 0): np.ones((32, 16), "f")})
    assert constant["std"] < 1e-3 and constant["uniformity"] == pytest.approx(0, abs=1e-5)
    assert health.effective_rank(constant["rank"]) == pytest.approx(1, abs=1e-3)
    assert "agreement" not in constant and "queue_age" not in constant
    spread = measured({("student", 0): rows(0, 256)})
    assert health.effective_rank(spread["rank"]) > 14 and spread["uniformity"] < -2.5


def test_networks_of_other_widths_are_not_compared():
    encoded = {("student", 0): rows(0), ("teacher", 0): rows(1, dim=8)}
    signals = measured(encoded, {"x": Queue.create(jax.random.key(0), 64, 8)})
    assert "agreement" not in signals and "alignment" not in signals


def test_a_teacher_of_whom_features_alone_were_kept_is_not_compared():
    """The teacher's embedding is None, as in SimReg's cache of features."""
    student, teacher = jnp.asarray(rows(0)), jnp.asarray(rows(1))
    bank = Queue.create(jax.random.key(0), 64, 16)

    def one(student, teacher):
        networks = {
            "student": {0: Encoded(student, student)},
            "teacher": {0: Encoded(teacher, None)},
        }
        return health.signals(Record(networks, {}), {"x": bank}, jnp.int32(0))

    signals = jax.vmap(one, axis_name=AXIS)(student[None], teacher[None])
    assert "health/std" in signals
    assert "health/alignment" not in signals and "health/agreement" not in signals


def test_the_alarm_waits_for_its_patience_and_rings_once(caplog):
    watch = health.Watch(HealthSettings(min_std=0.1, patience=3, stop=False))
    low, fine = {"health/std": 0.01, "health/rank": 1.0}, {"health/std": 0.5, "health/rank": 9.0}
    with caplog.at_level(logging.WARNING):
        for step, summary in enumerate([low, low, fine, low, low]):
            watch(step, summary)
        assert not caplog.records
        for step in range(5, 9):
            watch(step, low)
    assert [r.getMessage() for r in caplog.records if "collapsed" in r.getMessage()] and len(
        caplog.records
    ) == 1
    stopping = health.Watch(HealthSettings(min_std=0.1, patience=1, stop=True))
    with pytest.raises(NumericError, match=r"collapsed.*0\.0100 at step 7.*features 1\.0"):
        stopping(7, low)
    never = health.Watch(HealthSettings(min_std=0.0, patience=1, stop=True))
    never(0, {"health/std": 0.0})
    never(1, {})  # a loop without the signal, such as a probe's


def run(tmp_path, name, stop, recipe="squared_distance", monkeypatch=None):
    """Trains 40 steps with the alarm, and with a constant teacher if `monkeypatch` is given."""
    with helpers.tiny_backbone():
        config = helpers.tiny_config(recipe, batch_size=32, total_steps=40)
    rate = 8.0 if recipe == "squared_distance" else 0.5
    config.learning_rate.update(base_lr=rate, warmup_epochs=0, decay="constant")
    config.log.every_steps = 4
    config.checkpoint.every_steps = 40
    config.health.update(min_std=0.02, patience=3, stop=stop)
    if monkeypatch is not None:
        real = teacher.load

        def constant(*args):
            loaded = real(*args)
            head = loaded.variables["params"]["head"]
            head["out"]["kernel"] = 0 * head["out"]["kernel"]
            return loaded

        monkeypatch.setattr(teacher, "load", constant)
    with helpers.tiny_backbone():
        return pretrain.run(config, str(tmp_path / name), ArraySource(helpers.digits_splits()))


@pytest.mark.wiring  # checks how the run ends
def test_a_collapsing_run_is_stopped_or_warned_of(tmp_path, monkeypatch, caplog):
    """A teacher with equal outputs for all images makes the student collapse."""
    with pytest.raises(NumericError, match="The embedding has collapsed"):
        run(tmp_path, "stopped", True, monkeypatch=monkeypatch)
    with caplog.at_level(logging.WARNING, logger="disco_jax"):
        run(tmp_path, "warned", False)  # the teacher is still patched
    assert any("has collapsed" in record.getMessage() for record in caplog.records)


@pytest.mark.wiring  # checks how the run ends and what it logs
def test_a_healthy_run_is_left_alone_and_logs_its_signals(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="disco_jax"):
        assert run(tmp_path, "healthy", True, "moco_v2")["step"] == 40
    assert not any("has collapsed" in record.getMessage() for record in caplog.records)
    lines = [
        json.loads(x) for x in (tmp_path / "healthy" / "metrics.jsonl").read_text().splitlines()
    ]
    for line in lines:
        assert {"health/std", "health/rank", "health/uniformity", "health/alignment"} <= set(line)
        assert 1 <= line["health/rank"] <= 16
