"""A run killed at any moment and started again ends with the bits of one that was never killed."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

import helpers
from disco_jax import models
from disco_jax.data.arrays import ArraySource
from disco_jax.data.bags import Bags
from disco_jax.errors import Preempted, UserError
from disco_jax.evaluate import features
from disco_jax.tasks import pretrain
from disco_jax.train import teacher


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory):
    """The digits as an .npz file."""
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, **helpers.digits())
    return path


def arguments(digits_file, workdir, steps):
    return [
        "pretrain", "--config=disco:student=resnet8,teacher=resnet8,data=digits,smoke=true",
        f"--config.data.dir={digits_file}", "--config.data.source=npz",
        "--config.student.width=4", "--config.teacher.width=4", "--config.augment.size=16",
        f"--config.total_steps={steps}", "--config.batch_size=64", f"--workdir={workdir}",
        "--config.checkpoint.every_steps=3", "--config.log.every_steps=2",
    ]  # fmt: skip


def start(digits_file, workdir, steps):
    environment = {**os.environ, "XLA_FLAGS": helpers.one_device_flags()}
    return subprocess.Popen(
        [sys.executable, "-m", "disco_jax", *arguments(digits_file, workdir, steps)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def final(workdir, digits_file, steps):
    """Every array of the last checkpoint."""
    config = teacher.resolve(helpers.flags_config(arguments(digits_file, workdir, steps)))
    _, state, _, _ = helpers.smoke(config, 1)
    return helpers.restore(workdir, state)


def finish(process, expected=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == expected, output
    return output


@pytest.mark.slow
def test_sigkill_at_random_moments_changes_no_bit(tmp_path, digits_file):
    steps, rng = 60, random.Random(0)
    finish(start(digits_file, tmp_path / "whole", steps))
    killed, resumed = tmp_path / "killed", 0
    for _ in range(4):
        process = start(digits_file, killed, steps)
        metrics = killed / "metrics.jsonl"
        before = metrics.read_text().count("\n") if metrics.exists() else 0
        goal = before + rng.randint(1, 6)
        while process.poll() is None:  # until it has come a random number of lines further
            if metrics.exists() and metrics.read_text().count("\n") >= goal:
                break
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)  # anywhere within a step, or a save
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        resumed += "Resuming after step" in output
        if process.returncode == 0:
            break
    output = finish(start(digits_file, killed, steps))
    assert resumed >= 2 or "Resuming after step" in output
    whole, again = (final(tmp_path / name, digits_file, steps) for name in ("whole", "killed"))
    assert whole[1]["step"] == again[1]["step"] == steps
    assert whole[1]["position"] == again[1]["position"]
    chex.assert_trees_all_equal(whole[0], again[0])
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    numbers = [line["step"] for line in lines]
    assert numbers == sorted(set(numbers)) and numbers[-1] == steps


@pytest.mark.slow
def test_sigterm_saves_and_exits_75(tmp_path, digits_file):
    process = start(digits_file, tmp_path / "run", 5000)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = finish(process, expected=75)
    step = int(output.split("Asked to stop; step ")[1].split(" ")[0])
    assert final(tmp_path / "run", digits_file, 5000)[1]["step"] == step


def test_two_runs_in_one_process_of_the_same_config_are_identical(tmp_path):
    source = ArraySource(helpers.digits_splits())
    config = helpers.smoke_config("moco_v2", batch_size=64, total_steps=4)
    states = []
    for name in ("a", "b"):
        pretrain.run(config, str(tmp_path / name), source)
        states.append(features.load(str(tmp_path / name)).variables)
    chex.assert_trees_all_equal(*states)


def test_a_workdir_of_another_config_is_refused_with_the_difference(tmp_path):
    source = ArraySource(helpers.digits_splits())
    config = helpers.smoke_config("moco_v2", batch_size=64)
    pretrain.run(config, str(tmp_path), source)
    before = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    config.student.hidden = 64
    config.log.every_steps = 7  # free to change
    with pytest.raises(UserError, match=r"config\.student\.hidden: -1 -> 64") as error:
        pretrain.run(config, str(tmp_path), source)
    assert "every_steps" not in str(error.value)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == before


def test_a_directory_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not overwrite")
    with pytest.raises(UserError, match="is not empty"):
        pretrain.run(
            helpers.smoke_config("moco_v2"), str(tmp_path), ArraySource(helpers.digits_splits())
        )
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_runs_in_one_directory_are_refused(tmp_path):
    from disco_jax.train import workdir

    config = helpers.smoke_config("moco_v2")
    with (
        workdir.claim(str(tmp_path), config),
        pytest.raises(UserError, match="Another run is writing"),
        workdir.claim(str(tmp_path), config),
    ):
        pass


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    from disco_jax.errors import NumericError

    source = ArraySource(helpers.digits_splits())
    config = helpers.smoke_config("disco", batch_size=64, total_steps=40)
    config.learning_rate.per_256 = 1e30
    config.checkpoint.every_steps = 1
    with pytest.raises(NumericError, match=r"Not finite at step \d+: .*distill/loss"):
        pretrain.run(config, str(tmp_path), source)
    _, state, _, _ = helpers.smoke(config, 1)
    restored, meta = helpers.restore(tmp_path, state)
    assert meta["step"] >= 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(restored))


def test_a_commit_that_was_installed_is_noted(tmp_path, monkeypatch):
    from disco_jax.train import workdir

    monkeypatch.setenv("DISCO_JAX_COMMIT", "abc123")
    with workdir.claim(str(tmp_path), helpers.smoke_config("moco_v2")):
        (start,) = json.loads((tmp_path / "environment.json").read_text())
    assert start["git"] == "abc123"


def test_preempted_has_its_exit_code():
    assert Preempted.exit_code == 75


# What must come back beside weights. Times in epochs are cut so that they pass within the run.
ALL_QUEUES = {  # RETRO with two banks, and every other objective that remembers images of its own
    f"objectives.{name}.weight": 0.1
    for name in ("compress", "consistency", "binary_contrast", "online_clusters", "similarity")
}
LATE_PROTOTYPES = {"optimizer.frozen_epochs": 0, "optimizer.frozen_steps": 2}
SWAV = {"objectives.swapped.queue_size": 64, "objectives.swapped.queue_epochs": 0}
DINO = {
    "optimizer.fixed": ("prototypes/scale*",),
    "optimizer.frozen": ("prototypes/*",),
    "optimizer.weight_decay_end": 0.4,
    "optimizer.clip": 0.3,
    "objectives.self_distill.warmup_temperature": 0.02,
    "objectives.self_distill.warmup_epochs": 2,
}
MEMORIES = {
    "retro": ALL_QUEUES,
    "bingo": {"objectives.bags.own_epochs": 1},
    "swav": {**SWAV, **LATE_PROTOTYPES},
    "dino": {**DINO, **LATE_PROTOTYPES},
}


@pytest.fixture
def one_compilation(monkeypatch):
    """Runs share what the first of them prepared, and so the compiled step."""
    made, real = [], pretrain.prepare
    monkeypatch.setattr(
        pretrain, "prepare", lambda *args: made[0] if made else made.append(real(*args)) or made[0]
    )
    monkeypatch.setattr(pretrain.step, "parallel", functools.cache(pretrain.step.parallel))


def stopped_and_whole(recipe, changes, folder):
    """The states of a run whose last checkpoint was lost and of one that lost nothing.

    Between them, the fresh state. Checkpoints fall into the second of three epochs.
    """
    made = helpers.digits()
    source = ArraySource({"train": (made["train_images"][:70], made["train_labels"][:70])})
    config = helpers.smoke_config(recipe, batch_size=32, total_steps=6, **changes)
    config.checkpoint.every_steps = 3
    if config.bags.file:
        config.bags.file = str(folder / "bags.npz")
        with open(config.bags.file, "wb") as file:
            Bags(clusters=(np.arange(70) // 6).astype(np.int32)).save(file)
    pretrain.run(config, str(folder / "whole"), source)
    shutil.copytree(folder / "whole", folder / "again")
    shutil.rmtree(folder / "again" / "checkpoints" / "6")
    pretrain.run(config, str(folder / "again"), source)
    _, like, _, _ = helpers.smoke(config, 1)
    whole, again = (helpers.restore(folder / n, like)[0] for n in ("whole", "again"))
    return whole, like, again


def assert_memory_was_used(whole, like):
    """Every memory holds something by the end, and what it begins with has changed."""
    for name, memory in whole.memory.items():
        leaves = zip(jax.tree.leaves(memory), jax.tree.leaves(like.memory[name]), strict=True)
        for after, before in leaves:
            assert not after.ndim or (np.any(after != 0) and np.any(after != before)), name


@pytest.mark.parametrize("recipe", MEMORIES)
def test_memories_resume_bit_for_bit(recipe, tmp_path, one_compilation):
    """A run whose last checkpoint is lost goes on from the one before and ends the same."""
    whole, like, again = stopped_and_whole(recipe, MEMORIES[recipe], tmp_path)
    chex.assert_trees_all_equal(whole, again)
    assert_memory_was_used(whole, like)
    if recipe == "retro":
        assert len(whole.memory) == 2 + len(ALL_QUEUES) and len(whole.memory["contrast"]) == 2
    if recipe in ("swav", "dino"):
        moved = jax.tree.map(lambda a, b: np.any(a != b), whole.student, like.student)
        assert moved["params"]["prototypes"]["kernel0"]


SHARED = {"fast.shard_queue": True}


@pytest.fixture(scope="module")
def shared_queue(tmp_path_factory):
    """A function that starts a run, (step, devices, setting, ...) -> its state at the end.

    It goes on from the checkpoint of step 3 of a run on four devices that share their queues, and
    from its beginning where `step` is 0.
    """
    folder, source = tmp_path_factory.mktemp("shared"), ArraySource(helpers.digits_splits())
    sync = {f"{network}.norm": "sync" for network in ("student", "momentum", "teacher")}
    tiny = {"student.backbone": "tiny", "teacher.backbone": "tiny"}
    given = {"batch_size": 16, "total_steps": 6, "objectives.similarity.weight": 1.0}

    def run(name, start, devices, changes):
        config = helpers.smoke_config("disco", **sync, **tiny, **given, **changes)
        config.checkpoint.every_steps = 3
        if start:
            shutil.copytree(folder / "first", folder / name)
            shutil.rmtree(folder / name / "checkpoints" / "6")
        with helpers.devices(devices):
            pretrain.run(config, str(folder / name), source, allow_change="fast.")
        return helpers.restore(folder / name, helpers.smoke(config, 1)[1])[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BACKBONES, "tiny", (helpers.TinyBackbone, {}))
        yield run, run("first", 0, 4, SHARED)


def test_a_shared_queue_resumes_bit_for_bit(shared_queue):
    run, first = shared_queue
    chex.assert_trees_all_equal(run("again", 3, 4, SHARED), first)


@pytest.mark.parametrize(
    "start, devices, changes",
    [(3, 1, SHARED), (3, 2, {}), (0, 1, {})],
    ids=["one device", "fewer and whole from then on", "one device and always whole"],
)
def test_runs_end_alike_however_their_devices_share_a_queue(
    shared_queue, start, devices, changes, request
):
    """What is saved tells nothing of it, so that a run can go on in another way."""
    run, first = shared_queue
    found = run(request.node.callspec.id, start, devices, changes)
    expected, found = (jax.tree_util.tree_leaves_with_path(s) for s in (first, found))
    names = [jax.tree_util.keystr(path) for path, _ in expected]
    assert names == [jax.tree_util.keystr(path) for path, _ in found]
    for name, (_, a), (_, b) in zip(names, expected, found, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sslight_moco", "sslight_swav", "sslight_dino"])
def test_recipes_of_sslight_resume_bit_for_bit(recipe, tmp_path):
    """With their own optimizers, and compiled anew for the second start."""
    changes = SWAV if recipe == "sslight_swav" else {}
    whole, like, again = stopped_and_whole(recipe, changes, tmp_path)
    chex.assert_trees_all_equal(whole, again)
    assert_memory_was_used(whole, like)
