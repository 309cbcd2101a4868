"""Students that train together end as they would alone, whatever happens on the way."""

import json
import pathlib

import chex
import jax
import numpy as np
import pytest

import helpers
from disco_jax import methods
from disco_jax.data.arrays import ArraySource
from disco_jax.errors import NumericError, UserError
from disco_jax.tasks import joint, pretrain
from disco_jax.train import joint as shared

STEPS = 6
# The backbone is nobody's point here.
TINY = {"student.backbone": "tiny", "teacher.backbone": "tiny"}
# Other heads, another optimizer, another objective, another momentum.
CELLS = {
    "narrow": {"student.hidden": 8},
    "more": {
        "student.hidden": 32,
        "optimizer.name": "lars",
        "learning_rate.per_256": 0.3,
        "objectives.similarity.weight": 1.0,
        "momentum.ema_rate": 0.9,
    },
}


@pytest.fixture(scope="module")
def source():
    return ArraySource(helpers.digits_splits())


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory):
    """A run that starts again has its programs, as on the command line."""
    with helpers.programs_kept(tmp_path_factory.mktemp("programs")), helpers.tiny_networks():
        yield


def config_of(cell, recipe="disco", **changes):
    given = {
        **TINY,
        "total_steps": STEPS,
        "checkpoint.every_steps": 2,
        "log.every_steps": 2,
        "student.norm": "sync",
        **CELLS[cell],
        **changes,
    }
    return helpers.smoke_config(recipe, **given)


def together(folder, source, names=tuple(CELLS), **changes):
    configs = {name: config_of(name, **changes) for name in names}
    folders = {name: str(folder / name) for name in names}
    joint.run(configs, folders, source)
    return {name: state_of(folder / name, configs[name]) for name in names}


def state_of(folder, config):
    _, like, _, _ = helpers.smoke(config, 1)
    return helpers.restore(folder, like)[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, source):
    """Cell -> the state at the end of a run alone."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for name in CELLS:
        config = config_of(name)
        pretrain.run(config, str(folder / name), source)
        found[name] = state_of(folder / name, config)
    return folder, found


@pytest.fixture(scope="module")
def both(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("together")
    return folder, together(folder, source)


@pytest.mark.parametrize("cell", CELLS)
def test_each_student_learns_what_it_would_alone(cell, alone, both):
    (_, expected), (_, found) = alone, both
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(expected[cell]),
        jax.tree.leaves(found[cell]),
        strict=True,
    ):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6, err_msg=where)


def test_queues_that_devices_share_are_saved_whole_for_each(tmp_path, source, alone):
    """Together on devices that share queues, against alone on devices that have all of them."""
    shared = together(tmp_path, source, **{"fast.shard_queue": True})
    found, expected = shared["more"].memory, alone[1]["more"].memory
    assert found["contrast"]["view_1"].shared and found["similarity"]["view_0"].shared
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_each_run_keeps_its_own_numbers(alone, both):
    (one, _), (many, _) = alone, both
    for cell in CELLS:
        ours, theirs = (lines(folder / cell) for folder in (many, one))
        assert [line["step"] for line in ours] == [2, 4, 6]
        assert [line.keys() for line in ours] == [line.keys() for line in theirs]
        np.testing.assert_allclose(ours[-1]["loss"], theirs[-1]["loss"], rtol=1e-5)
        spent = json.loads((many / cell / "goodput.json").read_text())
        assert spent == json.loads((many / "narrow" / "goodput.json").read_text())
    assert "similarity/loss" in lines(many / "more")[0]
    assert "similarity/loss" not in lines(many / "narrow")[0]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_kill_between_two_saves_changes_no_bit(tmp_path, source, both, monkeypatch):
    """Some runs are a checkpoint further than others when it starts again."""
    real, saved = shared.Checkpoints.save, []

    def save(self, step, *rest):
        if len(saved) == 3:  # of two runs, the second checkpoint of the first alone
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
    """Two students cost two students and one teacher."""
    one, two = convolutions(["narrow"]), convolutions(["narrow", "again"])
    assert one["teacher"] == two["teacher"] > 0
    assert two["all"] - one["all"] == one["all"] - one["teacher"] > 0


def convolutions(names):
    """How many the traced step holds, and how many of them are the teacher's."""
    from disco_jax.data import views
    from disco_jax.models import encoder
    from disco_jax.ops.collectives import AXIS
    from disco_jax.train import step

    learners, states = {}, {}
    for name in names:
        real = dict.fromkeys(TINY, "resnet8")
        config = config_of("narrow", **real, **{"fast.shifts": "off"})
        method = methods.build(config)
        learners[name] = step.learner_of(config, method, 10)
        _, states[name], frozen, batch = helpers.smoke(config, 1)
    recipe = views.build(config.augment, config.views, config.local)
    made = step.make_joint_step(learners, recipe, 0)
    text = jax.make_jaxpr(jax.vmap(made, in_axes=(None, None, 0), axis_name=AXIS))(
        states, frozen, batch
    )
    network = method.networks["teacher"]
    crops = {v: np.zeros((2, 16, 16, 3), np.float32) for v in (0, 1)}
    alone = jax.make_jaxpr(
        lambda: encoder.encode(network, frozen["teacher"], crops, (0, 1), jax.random.key(0))
    )()
    return {"all": str(text).count("conv_general"), "teacher": str(alone).count("conv_general")}


@pytest.mark.wiring  # who is named, whatever the numbers were
def test_students_that_diverge_are_named(tmp_path, source):
    changes = {"narrow": {}, "wide": {"learning_rate.per_256": 1e30}}
    configs = {name: config_of("narrow", **changes[name]) for name in changes}
    folders = {name: str(tmp_path / name) for name in changes}
    with pytest.raises(shared.Diverged, match="wide: Not finite") as raised:
        joint.run(configs, folders, source)
    assert raised.value.names == ("wide",)
    assert isinstance(raised.value, NumericError)


def test_what_they_cannot_share_is_refused(tmp_path, source):
    configs = {"a": config_of("narrow"), "b": config_of("more")}
    configs["b"].augment.blur_prob = 0.1
    folders = {name: str(tmp_path / name) for name in configs}
    with pytest.raises(UserError, match=r"a and b cannot train together.*config.augment.blur_prob"):
        joint.run(configs, folders, source)
    assert not list(pathlib.Path(tmp_path).iterdir())
    configs["b"] = config_of("narrow", recipe="moco_v2")
    configs["b"].teacher = configs["a"].teacher
    with pytest.raises(UserError, match="cannot train together"):
        joint.run(configs, folders, source)


def test_groups_are_of_equal_keys_and_not_too_large():
    configs = {name: config_of(name) for name in CELLS}
    configs["wide"] = config_of("narrow", **{"student.hidden": 32})
    configs["seed"] = config_of("narrow", seed=1)
    keys = {name: joint.key(c, methods.build(c)) for name, c in configs.items()}
    assert joint.groups(keys, 8) == [["narrow", "more", "wide"], ["seed"]]
    assert joint.groups(keys, 2) == [["narrow", "more"], ["wide"], ["seed"]]
    assert joint.groups(keys, 1) == [["narrow"], ["more"], ["wide"], ["seed"]]


def test_knn_is_taken_of_each_student_in_its_own_name(source, monkeypatch):
    ready = {name: pretrain.prepare(config_of(name), source) for name in CELLS}
    monkeypatch.setattr(
        joint.monitor,
        "knn_of",
        lambda config, *_: lambda step, state: {"knn/top1": config.student.hidden + state + step},
    )
    found = joint._evaluation(ready)(100, {"narrow": 0.25, "more": 0.5})
    assert found == {"narrow/knn/top1": 108.25, "more/knn/top1": 132.5}
    assert shared.part_of("more", tuple(ready), found) == {"knn/top1": 132.5}
