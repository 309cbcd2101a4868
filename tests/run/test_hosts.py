"""Runs of several processes on one machine: they have equal losses and end together."""

import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import children
import host
import jax
import numpy as np
import pytest

import helpers
from disco_jax import files
from disco_jax.data.arrays import ArraySource
from disco_jax.run import hosts
from disco_jax.train import prepare
from disco_jax.workflows import pretrain

pytestmark = pytest.mark.wiring  # compares numbers of processes with those of one

DEVICES = 4  # total over all processes
STEPS = 10
CONFIG = {
    "batch_size": 64,
    "total_steps": STEPS,
    "log.every_steps": 1,
    "checkpoint.every_steps": 5,
    "log.replicas_every_steps": 5,
    # Sums over processes round differently from sums over the devices of one process. At the
    # recipes' rates, this tiny network amplifies a difference of 1e-6 to 2e-5 in ten steps.
    "learning_rate.base_lr": 0.003,
}
OF_RECIPE = {
    # MoCo's, DisCo's and SEED's objectives, shuffled BatchNorm in one network.
    "disco": {"objectives.similarity.weight": 1.0},
    # DINO's centre, SwAV's assignments and queue, and MoCo's queue, with synchronised BatchNorm;
    # SwAV's queue is used from the second step on.
    "dino": {
        "objectives.contrast.weight": 1.0,
        "objectives.swapped.weight": 1.0,
        "objectives.swapped.queue_size": 64,
        "objectives.swapped.queue_epochs": 0,
    },
}
SHARED = {"fast.shard_queue": True}  # each process stores only the rows of its own devices


LOST = 134, -signal.SIGABRT  # a shell reports the signal as 134 too


def reports_loss(output):
    """Returns whether JAX or a collective reported a lost process; either may be the first."""
    return "another task died" in output or "Another process of this run was lost" in output


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def config_of(recipe, processes):
    """Returns the settings of a run; several processes shard their queues, except with "dino"."""
    shared = SHARED if recipe == "disco" and processes > 1 else {}
    return {**CONFIG, **OF_RECIPE[recipe], **shared}


def launch(task, workdir, processes, recipe="disco", changes=None, peer_timeout_s=100, **settings):
    """Starts the processes of a run on `DEVICES` devices; returns a list of `Child`."""
    port = free_port()
    config = {**config_of(recipe, processes), **(changes or {})}
    words = json.dumps({"recipe": recipe, "config": config, **settings})
    environment = {
        "XLA_FLAGS": helpers.one_device_flags()
        + f" --xla_force_host_platform_device_count={DEVICES // processes}",
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
        started.append(children.start("host:main", task, workdir, words, **environment, **place))
    return started


def finish(processes, expected=0):
    """Waits until every process ends with exit code `expected`; returns their outputs."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [expected] * len(processes), "\n---\n".join([str(codes), *outputs])
    return outputs


def lines(workdir):
    """Returns step -> metrics; the metrics of an evaluation are in a separate line."""
    metrics = {}
    for text in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        metrics.setdefault(line["step"], {}).update(line)
    return metrics


def losses(workdir):
    """Returns f64[steps, losses]."""
    metrics = lines(workdir)
    assert list(metrics) == list(range(1, STEPS + 1))
    keys = sorted(key for key in metrics[1] if key == "loss" or key.endswith("/loss"))
    return np.array([[metrics[step][key] for key in keys] for step in metrics])


def ended(workdir):
    """Returns the checksums of every part of the last checkpoint, and the data position."""
    folder = pathlib.Path(workdir) / "checkpoints" / str(STEPS)
    (file,) = (path for path in (folder / "meta").iterdir() if path.name == "metadata")
    meta = json.loads(file.read_text())
    assert {"student", "momentum", "memory", "opt_state"} <= meta["checksums"].keys()
    return meta["checksums"], meta["position"]


@pytest.fixture(scope="module")
def alone():
    """A function that trains in this process, which has all devices; compiles a recipe once."""
    compiled, real, parallel = {}, prepare.prepare, pretrain.step.parallel

    def prepared(config, source):
        if config.name not in compiled:
            ready = real(config, source)
            compiled[config.name] = ready, parallel(ready.built.train_step)
        return compiled[config.name][0]

    def run(recipe, workdir):
        source = host.Shared(ArraySource(helpers.digits_splits()), 0, 1)
        config = helpers.tiny_config(recipe, **config_of(recipe, 1))
        with pytest.MonkeyPatch.context() as patch, helpers.tiny_backbone():
            patch.setattr(pretrain, "prepare", prepared)
            patch.setattr(pretrain.step, "parallel", lambda _: compiled[config.name][1])
            return pretrain.run(config, str(workdir), source, allow_change="fast.")

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory, alone):
    """A function (recipe, processes) -> workdir of a finished run."""
    workdirs = {}

    def run(recipe, processes):
        if (recipe, processes) not in workdirs:
            workdir = tmp_path_factory.mktemp(recipe) / str(processes)
            if processes == 1:
                alone(recipe, workdir)
            else:
                finish(launch("pretrain", workdir, processes, recipe))
            workdirs[recipe, processes] = workdir
        return workdirs[recipe, processes]

    return run


def test_two_processes_that_share_queues_lose_and_save_what_one_with_whole_ones_does(runs):
    """The run of two processes also compares replicas, without the sharded queues."""
    one, two = runs("disco", 1), runs("disco", 2)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5, atol=1e-5)
    with helpers.tiny_backbone():
        like = helpers.smoke(helpers.tiny_config("disco", **config_of("disco", 1)), 1)[1]
    whole, sharded = (helpers.restore(folder, like)[0].memory for folder in (one, two))
    for objective, view in (("contrast", "view_1"), ("similarity", "view_0")):
        queue, expected = sharded[objective][view], whole[objective][view]
        assert queue.pointer == expected.pointer == 0 and queue.vectors.shape == (64, 16)
        np.testing.assert_allclose(queue.vectors, expected.vectors, atol=1e-4)


def test_two_processes_lose_what_one_does_with_all_that_views_of_two_sizes_need(runs):
    one, two = losses(runs("dino", 1)), losses(runs("dino", 2))
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("processes", [1, 4])
def test_what_two_processes_saved_goes_on_in_others(runs, alone, tmp_path, processes, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(runs("disco", 2), workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    if processes == 1:
        with caplog.at_level("WARNING", logger="disco_jax"):
            alone("disco", workdir)
        output = caplog.text
    else:
        output = finish(launch("pretrain", workdir, processes))[0]
    assert f"saved by 2 hosts, now there are {processes}" in output
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


def test_a_mistake_is_told_by_every_process(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not overwrite")
    for output in finish(launch("pretrain", tmp_path, 2), 2):
        assert "is not empty and holds no run" in output


@pytest.mark.slow
def test_two_processes_end_together_in_every_way_and_the_next_start_changes_no_bit(runs, tmp_path):
    """Resumes a run after SIGTERM, a hang, a SIGKILL and a full disk, each in one process.

    Takes over a minute: ten processes, and two waits of 15 s. They reuse the programs of
    another run.
    """
    workdir = tmp_path / "run"
    shutil.copytree(runs("disco", 2) / files.PROGRAMS, workdir / files.PROGRAMS)

    def start(event, at, peer_timeout_s=20, **changes):
        event = {"event": event, "at": at, "process": 1}
        begin = time.monotonic()
        started = launch(
            "pretrain", workdir, 2, changes=changes, event=event, peer_timeout_s=peer_timeout_s
        )
        outputs = [process.communicate(timeout=300)[0] for process in started]
        assert time.monotonic() - begin < 250
        return [process.returncode for process in started], outputs

    # SIGTERM to one process stops all at one step, which is saved.
    codes, outputs = start(str(int(signal.SIGTERM)), 1)
    assert codes == [75, 75], outputs
    (step,) = {output.split("Stopped on request; step ")[1].split(" ")[0] for output in outputs}
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [step]
    assert int(step) < 5
    # A process hangs before its first step while the other waits inside a collective. Both wait
    # 15 s; the one that ends first may end the other too.
    codes, outputs = start("hang", 1, **{"log.hang_s": 15.0})
    assert 1 in codes and all(code == 1 or code in LOST for code in codes), (codes, outputs)
    for code, output in zip(codes, outputs, strict=True):
        assert code != 1 or f"no progress for 15 s after step {step}" in output
    # Killed at step 8 or earlier; step 5 may or may not be saved by then.
    codes, outputs = start(str(int(signal.SIGKILL)), 8 - int(step))
    assert codes[1] == -signal.SIGKILL and codes[0] in LOST, outputs
    assert reports_loss(outputs[0])
    # A process that fails alone ends with the exit code of its own error.
    codes, outputs = start("no room", 2, peer_timeout_s=10)
    assert codes[1] == 1 and codes[0] in LOST, outputs
    assert "/disk/of/process: No space left on device" in outputs[1]
    assert reports_loss(outputs[0])
    finish(launch("pretrain", workdir, 2))
    np.testing.assert_array_equal(losses(workdir), losses(runs("disco", 2)))
    assert ended(workdir) == ended(runs("disco", 2))


def test_errors_that_say_that_a_process_is_gone_are_told_apart(monkeypatch):
    reset = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    other = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    assert not hosts.peer_lost_message(reset)  # a run of one process cannot lose another
    monkeypatch.setattr(hosts, "_is_single_process", lambda: False)
    assert "Another process of this run was lost" in hosts.peer_lost_message(reset)
    for error in (other, ValueError("Connection reset")):
        assert not hosts.peer_lost_message(error)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_waits_for_a_lost_one_ends_within_the_time_out(victim):
    """Checks the documented exit code; process 0 is special because it runs the coordinator."""
    code = (
        "import os, sys, time; from disco_jax.run import hosts; me = int(sys.argv[2]); "
        "hosts.initialize(f'localhost:{sys.argv[1]}', 2, me, timeout_s=10); hosts.all_gather(me); "
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


MEETINGS = [
    (["--process=1", "--processes=2"], "need --coordinator=HOST:PORT"),
    (["--coordinator=localhost:1"], "missing: --processes, --process"),
    (["--coordinator=localhost:1", "--processes=2", "--process=2"], "is not one of 0..1"),
    (["--coordinator=localhost", "--processes=2", "--process=1"], "needs a port"),
    (["--distributed"], "could not connect"),
]


def test_wrong_meetings_are_refused(tmp_path):
    """Runs in a separate process, because a failed initialization may change the state of JAX."""
    code = (
        "import sys; from disco_jax import main\n"
        f"for words in {[words for words, _ in MEETINGS]!r}:\n"
        "    code = main.main(['pretrain', '--config=moco_v2:smoke=true', "
        f"'--workdir={tmp_path}', *words])\n"
        "    print('code', code, file=sys.stderr)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    messages = process.stderr.split("code 2")
    assert len(messages) == len(MEETINGS) + 1, process.stderr
    for (_, expected), message in zip(MEETINGS, messages, strict=False):
        assert expected in message
