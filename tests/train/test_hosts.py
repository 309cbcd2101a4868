"""Runs of several processes that meet over the loopback: equal losses, one fate."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import helpers
from disco_jax.train import hosts

TESTS = pathlib.Path(__file__).parents[1]
DEVICES = 4  # of all processes together
STEPS = 10
CONFIG = {
    "batch_size": 64,
    "total_steps": STEPS,
    "log.every_steps": 1,
    "checkpoint.every_steps": 5,
    "log.replicas_every_steps": 5,
    # Sums over processes round in another order than sums over the devices of one. At the recipes'
    # rates this tiny network makes a millionth of it after one step into 2e-5 after ten.
    "learning_rate.per_256": 0.003,
}
RECIPES = ("disco", "moco_v2", "seed", "swav", "dino")
OF_RECIPE = {  # a queue of earlier embeddings from the second step on
    "swav": {"objectives.swapped.queue_size": 64, "objectives.swapped.queue_epochs": 0},
}


LOST = 134, -signal.SIGABRT  # which a shell shows as 134 too


def told_of_loss(output):
    """By JAX, or by a collective that noticed first."""
    return "another task died" in output or "Another process of this run was lost" in output


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def launch(task, workdir, processes, recipe="disco", changes=None, peer_timeout_s=100, **settings):
    """Starts the processes of a run on `DEVICES` devices; a list of Popen."""
    port = free_port()
    config = {**CONFIG, **OF_RECIPE.get(recipe, {}), **(changes or {})}
    words = json.dumps({"recipe": recipe, "config": config, **settings})
    environment = {
        **os.environ,
        "XLA_FLAGS": helpers.one_device_flags()
        + f" --xla_force_host_platform_device_count={DEVICES // processes}",
        "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS / 'parity'}",
        "PEER_TIMEOUT_S": str(peer_timeout_s),
    }
    started = []
    for i in range(processes):
        place = {}
        if processes > 1:
            place = {
                "DISCO_JAX_COORDINATOR": f"localhost:{port}",
                "DISCO_JAX_PROCESSES": str(processes),
                "DISCO_JAX_PROCESS": str(i),
            }
        started.append(
            subprocess.Popen(
                [sys.executable, TESTS / "train" / "host.py", task, workdir, words],
                env={**environment, **place},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def finish(processes, expected=0):
    """Waits; every process must end with `expected`. Their outputs."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [expected] * len(processes), "\n---\n".join([str(codes), *outputs])
    return outputs


def lines(workdir):
    """Step -> metrics; an evaluation's are in a line of their own."""
    found = {}
    for text in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        found.setdefault(line["step"], {}).update(line)
    return found


def losses(workdir):
    """f64[steps, losses]."""
    found = lines(workdir)
    assert list(found) == list(range(1, STEPS + 1))
    keys = sorted(key for key in found[1] if key == "loss" or key.endswith("/loss"))
    return np.array([[found[step][key] for key in keys] for step in found])


def ended(workdir):
    """Checksums of every part of the last checkpoint, and the place in the data."""
    folder = pathlib.Path(workdir) / "checkpoints" / str(STEPS)
    (file,) = (path for path in (folder / "meta").iterdir() if path.name == "metadata")
    meta = json.loads(file.read_text())
    assert {"student", "momentum", "memory", "opt_state"} <= meta["checksums"].keys()
    return meta["checksums"], meta["position"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(recipe, processes) -> workdir of a finished run."""
    made = {}

    def run(recipe, processes):
        if (recipe, processes) not in made:
            workdir = tmp_path_factory.mktemp(recipe) / str(processes)
            finish(launch("pretrain", workdir, processes, recipe))
            made[recipe, processes] = workdir
        return made[recipe, processes]

    return run


@pytest.mark.parametrize(
    "recipe", [RECIPES[0], *(pytest.param(r, marks=pytest.mark.slow) for r in RECIPES[1:])]
)
def test_two_processes_lose_what_one_does(runs, recipe):
    alone, two = losses(runs(recipe, 1)), losses(runs(recipe, 2))
    np.testing.assert_allclose(two, alone, rtol=1e-5, atol=1e-5)


def test_two_processes_that_share_a_queue_lose_and_save_what_one_with_a_whole_one_does(
    runs, tmp_path
):
    """Each has the rows of its devices alone; replicas are compared on the way, but for these."""
    finish(launch("pretrain", tmp_path, 2, changes={"fast.shard_queue": True}))
    np.testing.assert_allclose(losses(tmp_path), losses(runs("disco", 1)), rtol=1e-5, atol=1e-5)
    like = helpers.smoke(helpers.smoke_config("disco", **CONFIG), 1)[1]
    ours, theirs = (
        helpers.restore(folder, like)[0].memory["contrast"]["view_1"]
        for folder in (tmp_path, runs("disco", 1))
    )
    assert ours.pointer == theirs.pointer == 0 and ours.vectors.shape == (64, 16)
    np.testing.assert_allclose(ours.vectors, theirs.vectors, atol=1e-4)


@pytest.mark.slow
def test_four_processes_lose_what_one_does(runs):
    np.testing.assert_allclose(
        losses(runs("disco", 4)), losses(runs("disco", 1)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("processes", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_what_two_processes_saved_goes_on_in_others(runs, tmp_path, processes):
    workdir = tmp_path / "run"
    shutil.copytree(runs("disco", 2), workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    outputs = finish(launch("pretrain", workdir, processes))
    assert f"Saved by 2 hosts, now {processes}" in outputs[0]
    np.testing.assert_allclose(losses(workdir), losses(runs("disco", 1)), rtol=1e-5, atol=1e-5)


def test_two_processes_evaluate(runs):
    outputs = finish(launch("knn", runs("disco", 2), 2))
    assert json.loads((runs("disco", 2) / "knn.json").read_text())["images"] == 360
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert results[0] == results[1]


def test_replicas_that_differ_are_told_on_every_process(tmp_path):
    outputs = finish(launch("replicas", tmp_path, 2), expected=3)
    for output in outputs:
        assert "equal" in output
        assert "The replicas differ after step 1, in 1 arrays" in output


def test_sigterm_to_one_process_stops_all_at_one_step(tmp_path):
    event = {"event": str(int(signal.SIGTERM)), "at": 4, "process": 1}
    changes = {"total_steps": 5000, "checkpoint.every_steps": 1000}
    outputs = finish(launch("pretrain", tmp_path / "run", 2, changes=changes, event=event), 75)
    steps = {output.split("Asked to stop; step ")[1].split(" ")[0] for output in outputs}
    assert len(steps) == 1
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [*steps]


def test_a_mistake_is_told_by_every_process(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not overwrite")
    for output in finish(launch("pretrain", tmp_path, 2), 2):
        assert "is not empty and holds no run" in output


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_next_start_changes_no_loss(runs, tmp_path):
    workdir = tmp_path / "run"
    event = {"event": str(int(signal.SIGKILL)), "at": 8, "process": 1}
    killed = launch("pretrain", workdir, 2, event=event, peer_timeout_s=20)
    begin = time.monotonic()
    outputs = [process.communicate(timeout=200)[0] for process in killed]
    assert killed[1].returncode == -signal.SIGKILL
    assert killed[0].returncode in LOST, outputs[0]
    assert told_of_loss(outputs[0])
    assert time.monotonic() - begin < 150
    finish(launch("pretrain", workdir, 2))
    np.testing.assert_array_equal(losses(workdir), losses(runs("disco", 2)))
    assert ended(workdir) == ended(runs("disco", 2))


def test_errors_that_say_that_a_process_is_gone_are_told_apart(monkeypatch):
    gone = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    other = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    assert not hosts.lost(gone)  # of one process, nobody can be gone
    monkeypatch.setattr(hosts, "_alone", lambda: False)
    assert "Another process of this run was lost" in hosts.lost(gone)
    assert not hosts.lost(other) and not hosts.lost(ValueError("Connection reset"))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_waits_for_a_lost_one_ends_within_the_time_out(victim):
    """The exit code of the documents, whichever is lost: the first is the one that all talk to."""
    code = (
        "import os, sys, time; from disco_jax.train import hosts; me = int(sys.argv[2]); "
        "hosts.meet(f'localhost:{sys.argv[1]}', 2, me, timeout_s=10); hosts.everyone(me); "
        f"me == {victim} and os.kill(os.getpid(), 9); time.sleep(100)"
    )
    port = str(free_port())
    started = [
        subprocess.Popen([sys.executable, "-c", code, port, str(i)], stderr=subprocess.PIPE)
        for i in (0, 1)
    ]
    errors = [process.communicate(timeout=90)[1] for process in started]
    assert started[victim].returncode == -signal.SIGKILL
    assert started[1 - victim].returncode == -signal.SIGABRT
    assert b"another task died" in errors[1 - victim]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["save", "evaluation"])
def test_a_run_killed_amid_something_ends_as_if_it_was_not(runs, tmp_path, what):
    workdir, changes = tmp_path / "run", {"monitor.knn_every_steps": 3, "monitor.images": 64}
    killed = launch("pretrain", workdir, 1, changes=changes, amid=(what, 2))
    finish(killed, -signal.SIGKILL)
    left = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert what == "evaluation" or left == {"5", "10.orbax-checkpoint-tmp"}
    outputs = finish(launch("pretrain", workdir, 1, changes=changes))
    # That of step 5 may be under way as the evaluation of step 6 begins.
    assert f"step {6 if '5' in left else 1}/10" in outputs[0]
    assert ("step 5/10" in outputs[0]) == ("5" not in left)
    np.testing.assert_array_equal(losses(workdir), losses(runs("disco", 1)))
    assert ended(workdir) == ended(runs("disco", 1))


def test_a_process_that_fails_alone_ends_with_its_own_code(tmp_path):
    event = {"event": "no room", "at": 4, "process": 1}
    failed = launch("pretrain", tmp_path, 2, event=event, peer_timeout_s=10)
    outputs = [process.communicate(timeout=200)[0] for process in failed]
    assert failed[1].returncode == 1 and failed[0].returncode in LOST, outputs
    assert "/disk/of/process: No space left on device" in outputs[1]
    assert told_of_loss(outputs[0])


@pytest.mark.slow
def test_a_process_that_hangs_ends_all_with_a_word(tmp_path):
    """Before its first step, where the others wait inside a collective."""
    event = {"event": "hang", "at": 1, "process": 1}
    changes = {"log.hang_s": 15.0}
    hung = launch("pretrain", tmp_path, 2, changes=changes, event=event)
    outputs = [process.communicate(timeout=300)[0] for process in hung]
    codes = [process.returncode for process in hung]
    # Both wait the same 15 s; the one that ends first may take the other with it.
    assert 1 in codes and all(code == 1 or code in LOST for code in codes), (codes, outputs)
    for code, output in zip(codes, outputs, strict=True):
        assert code != 1 or "nothing has happened for 15 s after step 0" in output


@pytest.mark.parametrize(
    "words, says",
    [
        (["--process=1", "--processes=2"], "need --coordinator=HOST:PORT"),
        (["--coordinator=localhost:1"], "missing: --processes, --process"),
        (["--coordinator=localhost:1", "--processes=2", "--process=2"], r"is not one of 0..1"),
        (["--coordinator=localhost", "--processes=2", "--process=1"], "needs a port"),
        (["--distributed"], "did not find one another"),
    ],
)
def test_wrong_meetings_are_refused(words, says, tmp_path):
    """In a process of its own, as a refused meeting may leave a mark on JAX."""
    code = (
        "import sys; from disco_jax import main; sys.exit(main.main(['pretrain', "
        f"'--config=moco_v2:smoke=true', '--workdir={tmp_path}', *{words!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert says.replace("\\", "") in done.stderr
