"""Resuming: runs that are killed and restarted end bit-identical to uninterrupted runs."""

import json
import random
import shutil
import signal
import time

import chex
import children
import jax
import numpy as np
import pytest

import helpers
from disco_jax.data.arrays import ArraySource
from disco_jax.data.bags import Bags
from disco_jax.errors import Preempted, UserError
from disco_jax.evaluate import features
from disco_jax.train import experiment
from disco_jax.workflows import pretrain


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with helpers.tiny_backbone():
        yield


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory):
    """Path of an .npz file with the digits."""
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, **helpers.digits())
    return path


STEPS = 60


def arguments(digits_file, workdir):
    return [
        "pretrain", "--config=disco:student=resnet8,teacher=resnet8,data=digits,smoke=true",
        f"--config.data.dir={digits_file}", "--config.data.source=npz",
        "--config.student.backbone=tiny", "--config.teacher.backbone=tiny",
        "--config.student.width=4", "--config.teacher.width=4", "--config.augment.size=16",
        "--config.monitor.knn_every_steps=4", "--config.monitor.images=64",
        f"--config.total_steps={STEPS}", "--config.batch_size=64", f"--workdir={workdir}",
        "--config.checkpoint.every_steps=3", "--config.log.every_steps=2",
        "--config.log.report=false", "--config.log.tensorboard=false",
        "--config.augment.jitter_prob=0", "--config.augment.blur_prob=0",
    ]  # fmt: skip


def start(digits_file, workdir, amid=("", 0)):
    """Starts a user's command line; `amid` says when it is killed, see `kills.amid`."""
    words = [*amid, *arguments(digits_file, workdir)]
    return children.start(
        "kills:main", *words, XLA_FLAGS=helpers.one_device_flags(), JAX_COMPILATION_CACHE_DIR=None
    )


def final(workdir, digits_file):
    """Returns the last checkpoint: all arrays and the metadata."""
    config = experiment.resolve(helpers.flags_config(arguments(digits_file, workdir)))
    _, state, _, _ = helpers.smoke(config, 1)
    return helpers.restore(workdir, state)


def finish(process, expected=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == expected, output
    return output


def lines(workdir):
    metrics = workdir / "metrics.jsonl"
    return metrics.read_text().splitlines() if metrics.exists() else []


def wait_for_lines(process, workdir, count):
    """Waits until a run has written `count` more lines or has ended."""
    goal = len(lines(workdir)) + count
    while process.poll() is None and len(lines(workdir)) < goal:
        time.sleep(0.01)


def saved(workdir):
    """Returns the names in the folder of checkpoints; incomplete ones have longer names."""
    return {path.name for path in (workdir / "checkpoints").iterdir()}


def compiled(workdir):
    """Returns the seconds spent compiling in all starts of a run."""
    return json.loads((workdir / "goodput.json").read_text())["seconds"]["compile"]


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_bits_of_one_that_was_not(tmp_path, digits_file):
    """Kills a run during a save, an evaluation and at random, and stops it by SIGTERM (code 75).

    Takes over a minute: eight starts of the command line. Each reuses what earlier ones compiled
    from `xla_cache` in the run's directory, as another machine would.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert "Compiling took" in finish(start(digits_file, whole))
    assert list((whole / "xla_cache").iterdir())
    finish(start(digits_file, killed, ("save", 2)), -signal.SIGKILL)
    assert saved(killed) == {"3", "6.orbax-checkpoint-tmp"}
    output = finish(start(digits_file, killed, ("evaluation", 2)), -signal.SIGKILL)
    assert "Resuming after step 3" in output
    rng = random.Random(0)
    for _ in range(2):
        process = start(digits_file, killed)
        wait_for_lines(process, killed, rng.randint(1, 3))
        time.sleep(rng.random() * 0.3)  # any time within a step or a save
        process.send_signal(signal.SIGKILL)
        assert "Resuming after step" in finish(process, -signal.SIGKILL)
    process = start(digits_file, killed)
    wait_for_lines(process, killed, 1)
    process.send_signal(signal.SIGTERM)
    output = finish(process, expected=75)
    step = int(output.split("Stopped on request; step ")[1].split(" ")[0])
    assert step < STEPS and f"{step}" in saved(killed)
    before = compiled(killed)
    assert f"Resuming after step {step}" in finish(start(digits_file, killed))
    assert compiled(killed) - before < 0.5 * compiled(whole)

    expected, resumed = (final(workdir, digits_file) for workdir in (whole, killed))
    assert expected[1]["step"] == resumed[1]["step"] == STEPS
    assert expected[1]["position"] == resumed[1]["position"]
    chex.assert_trees_all_equal(expected[0], resumed[0])
    metrics = [[json.loads(line) for line in lines(workdir)] for workdir in (whole, killed)]
    losses = [{line["step"]: line["loss"] for line in run if "loss" in line} for run in metrics]
    numbers = [line["step"] for line in metrics[1] if "loss" in line]
    assert numbers == sorted(set(numbers)) and numbers[-1] == STEPS
    # Only the last line is compared: after a start between two log steps, the next line is the
    # mean of fewer steps.
    assert losses[0][STEPS] == losses[1][STEPS]


def test_two_runs_in_one_process_of_the_same_config_are_identical(tmp_path):
    """Each run compiles separately. Another config in the first directory is then refused."""
    source = ArraySource(helpers.digits_splits())
    config = helpers.tiny_config("moco_v2", batch_size=64, total_steps=4)
    states = []
    for name in ("a", "b"):
        pretrain.run(config, str(tmp_path / name), source)
        states.append(features.load(str(tmp_path / name)).variables)
    chex.assert_trees_all_equal(*states)
    before = saved(tmp_path / "a")
    config.student.hidden = 64
    config.log.every_steps = 7  # may change between starts
    with pytest.raises(UserError, match=r"config\.student\.hidden: -1 -> 64") as error:
        pretrain.run(config, str(tmp_path / "a"), source)
    assert "every_steps" not in str(error.value)
    assert saved(tmp_path / "a") == before


def test_a_directory_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not overwrite")
    with pytest.raises(UserError, match="is not empty"):
        pretrain.run(
            helpers.smoke_config("moco_v2"), str(tmp_path), ArraySource(helpers.digits_splits())
        )
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_runs_in_one_directory_are_refused(tmp_path):
    from disco_jax.run import workdir

    config = helpers.smoke_config("moco_v2")
    with (
        workdir.claim(str(tmp_path), config),
        pytest.raises(UserError, match="Another run is writing"),
        workdir.claim(str(tmp_path), config),
    ):
        pass


@pytest.mark.wiring  # checks how the run ends
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    from disco_jax.errors import NumericError

    source = ArraySource(helpers.digits_splits())
    config = helpers.tiny_config("disco", batch_size=64, total_steps=40)
    config.learning_rate.base_lr = 1e30
    config.checkpoint.every_steps = 1
    with pytest.raises(NumericError, match=r"Not finite at step \d+: .*distill/loss"):
        pretrain.run(config, str(tmp_path), source)
    _, state, _, _ = helpers.smoke(config, 1)
    restored, meta = helpers.restore(tmp_path, state)
    assert meta["step"] >= 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(restored))


def test_a_commit_that_was_installed_is_noted(tmp_path, monkeypatch):
    from disco_jax.run import workdir

    monkeypatch.setenv("DISCO_JAX_COMMIT", "abc123")
    with workdir.claim(str(tmp_path), helpers.smoke_config("moco_v2")):
        (start,) = json.loads((tmp_path / "environment.json").read_text())
    assert start["git"] == "abc123"


def test_preempted_has_its_exit_code():
    assert Preempted.exit_code == 75


# State other than weights that must be restored. Durations in epochs are shortened so that they
# end within the run.
ALL_QUEUES = {  # RETRO with two queues, and every other objective with its own queue
    f"objectives.{name}.weight": 0.1
    for name in ("compress", "consistency", "binary_contrast", "online_clusters", "similarity")
}
LATE_PROTOTYPES = {"optimizer.frozen_epochs": 0, "optimizer.frozen_steps": 2}
SWAV = {"objectives.swapped.queue_size": 64, "objectives.swapped.queue_epochs": 0}
DINO = {
    "optimizer.frozen": ("prototypes/scale*",),
    "optimizer.frozen_until": ("prototypes/*",),
    "optimizer.weight_decay_end": 0.4,
    "optimizer.clip": 0.3,
    "objectives.self_distill.warmup_temperature": 0.02,
    "objectives.self_distill.warmup_epochs": 2,
}
# These cases also cover all optimizers: SGD, LARS, LARC and AdamW.
MEMORIES = {
    "retro": ALL_QUEUES,
    "bingo": {"objectives.bags.own_epochs": 1, "optimizer.name": "lars"},
    "swav": {**SWAV, **LATE_PROTOTYPES, "optimizer.name": "larc"},
    "dino": {**DINO, **LATE_PROTOTYPES, "optimizer.name": "adamw"},
}


@pytest.fixture
def one_compilation(monkeypatch):
    helpers.compile_once(monkeypatch)


def stopped_and_whole(recipe, changes, folder):
    """Returns the final states of an uninterrupted and of a resumed run, and a fresh state.

    The order is (uninterrupted, fresh, resumed). The resumed run has lost its last checkpoint.
    Checkpoints are saved in the second of three epochs.
    """
    digits = helpers.digits()
    source = ArraySource({"train": (digits["train_images"][:70], digits["train_labels"][:70])})
    config = helpers.tiny_config(recipe, batch_size=32, total_steps=6, **changes)
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
    """Asserts that every array of the memory is nonzero at the end and differs from its start."""
    for name, memory in whole.memory.items():
        leaves = zip(jax.tree.leaves(memory), jax.tree.leaves(like.memory[name]), strict=True)
        for after, before in leaves:
            assert not after.ndim or (np.any(after != 0) and np.any(after != before)), name


@pytest.mark.parametrize("recipe", MEMORIES)
def test_memories_resume_bit_for_bit(recipe, tmp_path, one_compilation):
    """Resumes a run from the checkpoint before the last one, and compares the final states."""
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
    """A function (name, start, devices, changes) -> final state, and the state of a first run.

    The first run shards its queues over four devices. The function resumes from the first run's
    checkpoint of step 3, or starts from scratch if `start` is 0.
    """
    folder, source = tmp_path_factory.mktemp("shared"), ArraySource(helpers.digits_splits())
    sync = {f"{network}.norm": "sync" for network in ("student", "momentum", "teacher")}
    settings = {"batch_size": 16, "total_steps": 6, "objectives.similarity.weight": 1.0}

    def run(name, start, devices, changes):
        config = helpers.tiny_config("disco", **sync, **settings, **changes)
        config.checkpoint.every_steps = 3
        if start:
            shutil.copytree(folder / "first", folder / name)
            shutil.rmtree(folder / name / "checkpoints" / "6")
        with helpers.devices(devices):
            pretrain.run(config, str(folder / name), source, allow_change="fast.")
        return helpers.restore(folder / name, helpers.smoke(config, 1)[1])[0]

    return run, run("first", 0, 4, SHARED)


def test_a_shared_queue_resumes_bit_for_bit(shared_queue):
    run, first = shared_queue
    chex.assert_trees_all_equal(run("again", 3, 4, SHARED), first)


@pytest.mark.parametrize(
    "start, devices, changes",
    [(3, 1, SHARED), (0, 1, {})],
    ids=["one device", "one device and always whole"],
)
def test_runs_end_alike_however_their_devices_share_a_queue(
    shared_queue, start, devices, changes, request
):
    """Checkpoints do not depend on the sharding, so a run may resume with another one.

    `test_hosts.py` covers the change from sharded to whole queues.
    """
    run, first = shared_queue
    state = run(request.node.callspec.id, start, devices, changes)
    expected, actual = (jax.tree_util.tree_leaves_with_path(s) for s in (first, state))
    names = [jax.tree_util.keystr(path) for path, _ in expected]
    assert names == [jax.tree_util.keystr(path) for path, _ in actual]
    for name, (_, a), (_, b) in zip(names, expected, actual, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5, err_msg=name)
