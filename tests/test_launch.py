"""launch/ against a stand-in for gcloud: what it asks, in which order, and what it refuses."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ABSENT = ["tpu-vm describe", 1, "ERROR: NOT_FOUND: no such node"]
READY = ["tpu-vm describe state", 0, "READY"]


@pytest.fixture
def cloud(tmp_path):
    """Runs launch/tpu.sh in a clean clone; .answers, .calls() and .notes are the cloud's."""
    return Cloud(tmp_path)


class Cloud:
    def __init__(self, folder):
        self.folder, self.notes = folder, folder / "created"
        (folder / "bin").mkdir()
        stand_in = folder / "bin" / "gcloud"
        program = (ROOT / "tests" / "launch_gcloud.py").read_text()
        stand_in.write_text(f"#!{sys.executable} -IS\n{program}")  # starts in no time
        stand_in.chmod(0o755)
        self.checkout = folder / "checkout"
        shutil.copytree(ROOT / "launch", self.checkout / "launch", ignore=lambda *_: {".created"})
        git = ["git", "-C", str(self.checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-qm", "a"], check=True)
        words = [*git, "rev-parse", "HEAD"]
        self.commit = subprocess.run(words, check=True, capture_output=True, text=True).stdout[:-1]
        self.answer()

    def answer(self, *answers):
        (self.folder / "answers.json").write_text(json.dumps(answers))

    def run(self, *words, script="tpu.sh", **settings):
        environment = {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
            "GCLOUD": str(self.folder),
            "CREATED_DIR": str(self.notes),
            "PROJECT": "project",
            "ZONE": "zone",
            "NAME": "slice",
            "WORKDIR": "gs://bucket/run",
            "POLL_S": "0",
            **settings,
        }
        return subprocess.run(
            ["bash", self.checkout / "launch" / script, *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self):
        """(group, verb, all words) of each call."""
        file = self.folder / "calls.jsonl"
        made = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [(words[2], words[3], words) for words in made]

    def verbs(self):
        return [verb for _, verb, _ in self.calls()]

    def note(self, provision="spot"):
        self.notes.mkdir(exist_ok=True)
        (self.notes / "slice").write_text(f"secret {provision}\n")


@pytest.mark.parametrize(
    "provision, group, spot",
    [
        ("on-demand", "tpu-vm", False),
        ("spot", "tpu-vm", True),
        ("queued", "queued-resources", False),
        ("queued-spot", "queued-resources", True),
    ],
)
def test_create_makes_what_is_asked_for_and_notes_it(cloud, provision, group, spot):
    cloud.answer(ABSENT)
    done = cloud.run("create", PROVISION=provision)
    assert done.returncode == 0, done.stderr
    (_, first, _), (made, verb, words) = cloud.calls()
    assert (first, made, verb) == ("describe", group, "create")
    assert ("--spot" in words) == spot
    owner = (cloud.notes / "slice").read_text().split()[0]
    assert f"--labels=disco-jax={owner}" in words and len(owner) == 16
    assert {"--project=project", "--zone=zone", "slice"} <= set(words)


def test_create_takes_no_slice_of_others_and_none_twice(cloud):
    cloud.answer(READY)
    done = cloud.run("create")
    assert done.returncode == 2 and "exists already" in done.stderr
    assert cloud.verbs() == ["describe"] and not list(cloud.notes.glob("*"))
    cloud.note()
    done = cloud.run("create")
    assert done.returncode == 2 and "created from here before" in done.stderr


def test_a_cloud_that_does_not_answer_is_not_an_absent_slice(cloud):
    cloud.answer(["describe", 1, "ERROR: could not resolve host"])
    assert cloud.run("create").returncode == 1
    assert cloud.verbs() == ["describe"] and not list(cloud.notes.glob("*"))
    cloud.note()
    cloud.answer(["describe", 1, "ERROR: could not resolve host"])
    assert cloud.run("delete").returncode == 1
    assert "delete" not in cloud.verbs() and (cloud.notes / "slice").exists()


def test_delete_ends_only_what_was_created_here(cloud):
    done = cloud.run("delete")
    assert done.returncode == 2 and "not created from here" in done.stderr and not cloud.calls()
    cloud.note()
    cloud.answer(READY, ["labels.disco-jax", 0, "another"])
    done = cloud.run("delete")
    assert done.returncode == 2 and "is another than" in done.stderr
    assert "delete" not in cloud.verbs() and (cloud.notes / "slice").exists()
    cloud.answer(READY, ["labels.disco-jax", 0, "secret"])
    assert cloud.run("delete").returncode == 0
    assert cloud.verbs()[-1] == "delete" and not (cloud.notes / "slice").exists()


def test_a_deletion_that_fails_is_not_forgotten(cloud):
    cloud.note()
    cloud.answer(READY, ["labels.disco-jax", 0, "secret"], ["tpu-vm delete", 1, "ERROR: no"])
    assert cloud.run("delete").returncode != 0
    assert (cloud.notes / "slice").exists()


def test_setup_installs_this_commit_on_all_machines(cloud):
    done = cloud.run("setup")
    assert done.returncode == 0, done.stderr
    (_, _, scp), (_, _, ssh) = cloud.calls()
    assert scp[3:6] == [
        "scp",
        str(cloud.folder / f"disco_jax-{cloud.commit}.tar.gz"),
        "slice:disco_jax.tar.gz",
    ]
    assert "--worker=all" in scp and "--worker=all" in ssh
    command = next(word for word in ssh if word.startswith("--command="))
    assert cloud.commit in command and "'./disco_jax[tpu]'" in command
    (cloud.checkout / "launch" / "new.sh").touch()
    done = cloud.run("setup")
    assert done.returncode == 2 and "not committed" in done.stderr


def test_a_copy_that_fails_ends_the_setup(cloud):
    cloud.answer(["scp", 1, "ERROR: no route"])
    assert cloud.run("setup").returncode != 0
    assert cloud.verbs() == ["scp"]


def test_run_passes_flags_on_unharmed_and_starts_once(cloud, tmp_path):
    """The line that gcloud gets is run by a shell, as on a machine of the slice."""
    flags = ["--config", "disco:student=resnet18", '--config.name=it\'s $HOME; "two words"']
    assert cloud.run("run", *flags).returncode == 0
    ((_, _, words),) = cloud.calls()
    line = next(word for word in words if word.startswith("--command=")).removeprefix("--command=")
    machine = tmp_path / "machine"
    (machine / "disco_venv" / "bin").mkdir(parents=True)
    program = machine / "disco_venv" / "bin" / "disco-jax"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "$DISCO_JAX_COMMIT"\nsleep 0.5\nexit 75\n')
    program.chmod(0o755)
    (machine / "disco_jax").mkdir()
    (machine / "disco_jax" / "COMMIT").write_text("abc123\n")  # as `setup` leaves it

    def shell():
        return subprocess.run(["bash", "-c", line], cwd=machine, capture_output=True, text=True)

    assert shell().returncode == 0
    again = shell()
    assert again.returncode == 1 and "under way" in again.stderr
    for _ in range(100):
        if (machine / "run.rc").exists() and (machine / "run.rc").read_text():
            break
        subprocess.run(["sleep", "0.1"], check=True)
    assert (machine / "run.rc").read_text() == "75\n"
    expected = ["pretrain", "--distributed", "--workdir=gs://bucket/run", *flags, "abc123"]
    assert (machine / "run.log").read_text().splitlines() == expected


def test_the_babysitter_recreates_a_preempted_slice_and_ends_with_the_run(cloud):
    cloud.note()
    cloud.answer(
        ["describe value(state)", 0, "PREEMPTED"],
        ["describe value(state)", 0, "PREEMPTED"],
        ["labels.disco-jax", 0, "secret"],
        ABSENT,  # after the deletion
        ["describe value(state)", 0, "CREATING"],
        READY,
        ["ssh run.rc)", 0, "rc=none\nrc=none"],
        READY,
        ["ssh run.rc)", 0, "rc=running\nrc=running"],
        READY,
        ["ssh run.rc)", 0, "rc=75\nrc=75"],
        READY,
        ["ssh run.rc)", 0, "rc=0\nrc=0"],
    )
    done = cloud.run("babysit", "--config=disco")
    assert done.returncode == 0, done.stderr
    verbs = [verb for verb in cloud.verbs() if verb != "describe"]
    start = ["scp", "ssh", "ssh"]  # setup and run
    assert verbs == ["delete", "create", "ssh", *start, "ssh", "ssh", *start, "ssh"]


def test_a_lost_process_beside_one_that_is_done_is_no_end(cloud):
    cloud.note()
    cloud.answer(READY, ["ssh run.rc)", 0, "rc=0\nrc=134"], READY, ["ssh run.rc)", 0, "rc=0\nrc=0"])
    done = cloud.run("babysit")
    assert done.returncode == 0 and "Starting the run (before: 134)" in done.stdout
    assert cloud.verbs() == ["describe", "ssh", "scp", "ssh", "ssh", "describe", "ssh"]


@pytest.mark.parametrize("code, ends", [(2, 2), (3, 3)])
def test_the_babysitter_does_not_repeat_a_mistake(cloud, code, ends):
    cloud.note()
    cloud.answer(READY, ["ssh run.rc)", 0, f"rc=134\nrc={code}"])
    done = cloud.run("babysit")
    assert done.returncode == ends and "would not help" in done.stderr
    assert cloud.verbs() == ["describe", "ssh"]


def test_the_babysitter_gives_up_after_so_many_restarts(cloud):
    cloud.note()
    cloud.answer(["always describe value(state)", 0, "READY"], ["always ssh run.rc)", 0, "rc=1"])
    done = cloud.run("babysit", MAX_RESTARTS="2")
    assert done.returncode == 4
    assert cloud.verbs().count("scp") == 2


def test_the_babysitter_waits_for_a_queue_and_asks_again_when_it_fails(cloud):
    cloud.note("queued-spot")
    cloud.answer(
        ABSENT,
        ["queued-resources describe", 0, "WAITING_FOR_RESOURCES"],
        ABSENT,
        ["queued-resources describe", 0, "FAILED"],
        ABSENT,
        ABSENT,
        READY,
        ["ssh run.rc)", 0, "rc=0"],
    )
    done = cloud.run("babysit", PROVISION="queued-spot")
    assert done.returncode == 0, done.stderr
    changes = [(g, v) for g, v, _ in cloud.calls() if v in ("create", "delete")]
    assert changes == [("queued-resources", "delete"), ("queued-resources", "create")]


def test_no_capacity_is_no_reason_to_give_up(cloud):
    cloud.answer(
        ABSENT, ABSENT, ["create", 1, "ERROR: no capacity"], ABSENT,
        ABSENT, ABSENT, ["create", 0, ""], READY, ["ssh run.rc)", 0, "rc=0"],
    )  # fmt: skip
    done = cloud.run("babysit")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs().count("create") == 2


@pytest.mark.parametrize(
    "words",
    ["create", "setup", "run --config=disco", "logs 3", "fetch here", "list", "delete", "babysit"],
)
def test_a_dry_run_prints_what_a_shell_could_run_and_does_nothing(cloud, words):
    done = cloud.run("--dry-run", *words.split())
    assert done.returncode == 0 and not cloud.calls() and not cloud.notes.exists(), done.stderr
    count = "gcloud() { echo one; }; git() { :; }; mkdir() { :; }; "
    ran = subprocess.run(["bash", "-euc", count + done.stdout], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.startswith("one"), ran.stderr


def test_other_commands_ask_for_what_they_say(cloud):
    cloud.run("logs", "3")
    assert {"--worker=3", "--command=tail -n 100 -F run.log"} <= set(cloud.calls()[-1][2])
    cloud.run("fetch", str(cloud.folder / "there"))
    assert cloud.calls()[-1][2][:3] == ["storage", "rsync", "--recursive"]
    cloud.answer(READY, ["ssh run.rc)", 0, "rc=running\nrc=75"])
    assert cloud.run("status").stdout.splitlines() == ["slice: READY", "run: 75"]


@pytest.mark.parametrize(
    "words, settings, says",
    [
        (["create"], {"PROJECT": ""}, "PROJECT is empty"),
        (["run"], {"WORKDIR": ""}, "WORKDIR is empty"),
        (["create"], {"PROVISION": "free"}, "PROVISION=free is not one of"),
        (["create", "now"], {}, "takes no further words: now"),
        (["fetch"], {}, "fetch takes a directory"),
        (["crate"], {}, "launch/tpu.sh [--dry-run] create"),
    ],
)
def test_mistakes_are_told(cloud, words, settings, says):
    done = cloud.run(*words, **settings)
    assert done.returncode == 2 and says in done.stderr
    assert not cloud.calls()


def test_hosts_are_given_their_places():
    done = subprocess.run(
        ["bash", ROOT / "launch" / "hosts.sh", "--dry-run", "a,b", "pretrain", "--config.name=x y"],
        check=True,
        capture_output=True,
        text=True,
    )
    first, second = (shlex.split(line) for line in done.stdout.splitlines())
    for i, line in enumerate((first, second)):
        words = shlex.split(line[-1])
        assert line[:-1] == ["ssh", "-tt", "-o", "BatchMode=yes", "ab"[i]]
        place = ["--coordinator=a:8476", "--processes=2", f"--process={i}"]
        assert words[-5:] == ["pretrain", "--config.name=x y", *place]


@pytest.mark.parametrize("codes, expected", [((0, 0), 0), ((0, 3), 3), ((75, 75), 75)])
def test_hosts_end_with_the_code_of_the_run(tmp_path, codes, expected):
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\ncase "$*" in *--process=0*) exit $A;; *) exit $B;; esac\n')
    ssh.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "A": str(codes[0]), "B": str(codes[1])}
    words = ["bash", ROOT / "launch" / "hosts.sh", "a,b", "pretrain"]
    assert subprocess.run(words, env=environment, timeout=60).returncode == expected


@pytest.mark.parametrize("code, requeued", [(75, True), (0, False), (3, False)])
def test_slurm_queues_a_preempted_run_again(tmp_path, code, requeued):
    for name in ("srun", "scontrol"):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\necho {name} "$@" >>"{tmp_path}/calls"\nexit ${{{name.upper()}}}\n'
        )
        program.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SRUN": str(code),
        "SCONTROL": "0",
        "SLURM_JOB_ID": "17",
    }
    words = ["bash", ROOT / "launch" / "slurm.sh", "pretrain", "--config=disco"]
    assert subprocess.run(words, env=environment, timeout=60).returncode == code
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].endswith("disco-jax pretrain --config=disco --distributed")
    assert calls[1:] == (["scontrol requeue 17"] if requeued else [])


def test_a_sweep_is_shared_among_slices(cloud):
    cloud.notes.mkdir()
    for i in (0, 1):
        (cloud.notes / f"slice-{i}").write_text("secret spot\n")
    cloud.answer(
        ["always slice-1 run.rc)", 0, "rc=3"],
        ["always run.rc)", 0, "rc=0"],
        ["always describe value(state)", 0, "READY"],
    )
    logs = cloud.folder / "logs"
    done = cloud.run("2", "--config=sweeps/seed", script="sweep.sh", LOGS_DIR=str(logs))
    assert done.returncode == 3
    assert "share 1 ended with exit code 3" in done.stderr and "share 0 ended" not in done.stderr
    assert "finished" in (logs / "slice-0.log").read_text()
    asked = {word for _, _, words in cloud.calls() for word in words if word.startswith("slice")}
    assert asked == {"slice-0", "slice-1"}


def test_a_dry_run_of_a_sweep_prints_each_share(cloud):
    done = cloud.run("--dry-run", "2", "--config=sweeps/seed", script="sweep.sh")
    assert done.returncode == 0, done.stderr
    assert not cloud.calls()
    for i in (0, 1):
        assert f"slice-{i}" in done.stdout and f"--worker={i}" in done.stdout
    assert done.stdout.count("--workers=2") == 2
    assert "sweep --distributed" in done.stdout.replace("\\", "")
    for words in ((), ("0",), ("two",)):
        refused = cloud.run(*words, script="sweep.sh")
        assert refused.returncode == 2 and "usage: launch/sweep.sh" in refused.stderr
