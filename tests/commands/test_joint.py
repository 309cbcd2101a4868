"""Tests of joint training: students end as if each had trained alone, also after restarts."""

import json
import pathlib

import chex
import jax
import numpy as np
import pytest

import helpers
from disco_jax.data.arrays import ArraySource
from disco_jax.errors import NumericError, UserError
from disco_jax.train import joint as shared
from disco_jax.train.experiment import assemble
from disco_jax.workflows import joint_runs, pretrain

STEPS = 6
# These tests do not depend on the backbone.
TINY = {"student.backbone": "tiny", "teacher.backbone": "tiny"}
# Cells that differ in head, optimizer, objective and EMA rate.
CELLS = {
    "narrow": {"student.hidden": 8},
    "more": {
        "student.hidden": 32,
        "optimizer.name": "lars",
        "learning_rate.base_lr": 0.3,
        "objectives.similarity.weight": 1.0,
        "momentum.ema_rate": 0.9,
    },
}


@pytest.fixture(scope="module")
def source():
    return ArraySource(helpers.digits_splits())


@pytest.fixture(scope="module", autouse=True)
def shared_programs(tmp_path_factory):
    """Enables the compilation cache, as the command line does."""
    with helpers.programs_kept(tmp_path_factory.mktemp("programs")), helpers.tiny_networks():
        yield


def config_of(cell, recipe="disco", **changes):
    fields = {
        **TINY,
        "total_steps": STEPS,
        "checkpoint.every_steps": 2,
        "log.every_steps": 2,
        "student.norm": "sync",
        **CELLS[cell],
        **changes,
    }
    return helpers.only_flipped(helpers.smoke_config(recipe, **fields))


def together(folder, source, names=tuple(CELLS), **changes):
    configs = {name: config_of(name, **changes) for name in names}
    folders = {name: str(folder / name) for name in names}
    joint_runs.run(configs, folders, source)
    return {name: state_of(folder / name, configs[name]) for name in names}


def state_of(folder, config):
    _, like, _, _ = helpers.smoke(config, 1)
    return helpers.restore(folder, like)[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, source):
    """Folder of separate runs, and map from cell to the state at the end of its run."""
    folder, states = tmp_path_factory.mktemp("alone"), {}
    for name in CELLS:
        config = config_of(name)
        pretrain.run(config, str(folder / name), source)
        states[name] = state_of(folder / name, config)
    return folder, states


@pytest.fixture(scope="module")
def both(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("together")
    return folder, together(folder, source)


@pytest.mark.parametrize("cell", CELLS)
def test_each_student_learns_what_it_would_alone(cell, alone, both):
    (_, expected), (_, actual) = alone, both
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(expected[cell]),
        jax.tree.leaves(actual[cell]),
        strict=True,
    ):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6, err_msg=where)


def test_queues_that_devices_share_are_saved_whole_for_each(tmp_path, source, alone):
    """Compares joint training with sharded queues to separate runs with replicated queues."""
    sharded = together(tmp_path, source, **{"fast.shard_queue": True})
    memory, expected = sharded["more"].memory, alone[1]["more"].memory
    assert memory["contrast"]["view_1"].shared and memory["similarity"]["view_0"].shared
    for a, b in zip(jax.tree.leaves(memory), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_each_run_keeps_its_own_numbers(alone, both):
    (one, _), (many, _) = alone, both
    for cell in CELLS:
        actual, expected = (lines(folder / cell) for folder in (many, one))
        assert [line["step"] for line in actual] == [2, 4, 6]
        assert [line.keys() for line in actual] == [line.keys() for line in expected]
        np.testing.assert_allclose(actual[-1]["loss"], expected[-1]["loss"], rtol=1e-5)
        spent = json.loads((many / cell / "goodput.json").read_text())
        assert spent == json.loads((many / "narrow" / "goodput.json").read_text())
    assert "similarity/loss" in lines(many / "more")[0]
    assert "similarity/loss" not in lines(many / "narrow")[0]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_kill_between_two_saves_changes_no_bit(tmp_path, source, both, monkeypatch):
    """Interrupts joint training when only some runs have saved their next checkpoint."""
    real, saved = shared.Checkpoints.save, []

    def save(self, step, *rest):
        if len(saved) == 3:  # two runs: only the first has saved its second checkpoint
            self.wait()
            raise KeyboardInterrupt
        saved.append(step)
        real(self, step, *rest)
        self.wait()

    monkeypatch.setattr(shared.Checkpoints, "save", save)
    with pytest.raises(KeyboardInterrupt):
        together(tmp_path, source)
    monkeypatch.undo()
    assert saved == [2, 2, 4]
    chex.assert_trees_all_equal(together(tmp_path, source), both[1])
    assert [line["step"] for line in lines(tmp_path / "narrow")] == [2, 4, 6]


def test_the_teacher_sees_the_images_once():
    """Counts convolutions: a second student adds no teacher pass."""
    one, two = convolutions(["narrow"]), convolutions(["narrow", "again"])
    assert one["teacher"] == two["teacher"] > 0
    assert two["all"] - one["all"] == one["all"] - one["teacher"] > 0


def convolutions(names):
    """Counts the convolutions in the traced joint step, and in the teacher's passes."""
    from disco_jax.models import encoder
    from disco_jax.ops.collectives import AXIS
    from disco_jax.train import step

    learners, states = {}, {}
    for name in names:
        real = dict.fromkeys(TINY, "resnet8")
        config = config_of("narrow", **real, **{"fast.shifts": "off"})
        experiment = assemble(config, steps_per_epoch=10)
        learners[name] = experiment.build_step().learner
        _, states[name], frozen, batch = helpers.smoke(config, 1)
    joint_step = step.make_joint_step(learners, experiment.views, 0)
    text = jax.make_jaxpr(jax.vmap(joint_step, in_axes=(None, None, 0), axis_name=AXIS))(
        states, frozen, batch
    )
    network = experiment.method.networks["teacher"]
    crops = {v: np.zeros((2, 16, 16, 3), np.float32) for v in (0, 1)}
    alone = jax.make_jaxpr(
        lambda: encoder.encode(network, frozen["teacher"], crops, (0, 1), jax.random.key(0))
    )()
    return {"all": str(text).count("conv_general"), "teacher": str(alone).count("conv_general")}


@pytest.mark.wiring  # checks the names in the error, not the numbers
def test_students_that_diverge_are_named(tmp_path, source):
    changes = {"narrow": {}, "wide": {"learning_rate.base_lr": 1e30}}
    configs = {name: config_of("narrow", **changes[name]) for name in changes}
    folders = {name: str(tmp_path / name) for name in changes}
    with pytest.raises(shared.Diverged, match="wide: Not finite") as raised:
        joint_runs.run(configs, folders, source)
    assert raised.value.names == ("wide",)
    assert isinstance(raised.value, NumericError)


def test_what_they_cannot_share_is_refused(tmp_path, source):
    configs = {"a": config_of("narrow"), "b": config_of("more")}
    configs["b"].augment.blur_prob = 0.1
    folders = {name: str(tmp_path / name) for name in configs}
    with pytest.raises(UserError, match=r"a and b cannot train together.*config.augment.blur_prob"):
        joint_runs.run(configs, folders, source)
    assert not list(pathlib.Path(tmp_path).iterdir())
    configs["b"] = config_of("narrow", recipe="moco_v2")
    configs["b"].teacher = configs["a"].teacher
    with pytest.raises(UserError, match="cannot train together"):
        joint_runs.run(configs, folders, source)


def test_groups_are_of_equal_keys_and_not_too_large():
    configs = {name: config_of(name) for name in CELLS}
    configs["wide"] = config_of("narrow", **{"student.hidden": 32})
    configs["seed"] = config_of("narrow", seed=1)
    keys = {name: joint_runs.key(assemble(config)) for name, config in configs.items()}
    assert joint_runs.groups(keys, 8) == [["narrow", "more", "wide"], ["seed"]]
    assert joint_runs.groups(keys, 2) == [["narrow", "more"], ["wide"], ["seed"]]
    assert joint_runs.groups(keys, 1) == [["narrow"], ["more"], ["wide"], ["seed"]]


def test_knn_is_taken_of_each_student_in_its_own_name(source, monkeypatch):
    ready = {name: pretrain.prepare(config_of(name), source) for name in CELLS}
    monkeypatch.setattr(
        joint_runs.monitor,
        "knn_of",
        lambda config, *_: lambda step, state: {"knn/top1": config.student.hidden + state + step},
    )
    metrics = joint_runs._evaluation(ready)(100, {"narrow": 0.25, "more": 0.5})
    assert metrics == {"narrow/knn/top1": 108.25, "more/knn/top1": 132.5}
    assert shared.part_of("more", tuple(ready), metrics) == {"knn/top1": 132.5}
