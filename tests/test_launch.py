"""launch/ with a fake gcloud: the commands that the scripts run, their order, and refusals."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ABSENT = ["tpu-vm describe", 1, "ERROR: NOT_FOUND: no such node"]
READY = ["tpu-vm describe state", 0, "READY"]
OWN = READY, ["labels.disco-jax", 0, "OWNER"]  # answers that let a deletion proceed

# A shell cannot trap signals that were ignored at its start, e.g. SIGINT in the background.
RESTORE_SIGNALS = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def rc(*codes):
    """Returns the machines' answer to a query of the run's exit codes."""
    return ["ssh run.rc)", 0, "\n".join(f"rc={code}" for code in codes)]


def always(answer):
    words, code, output = answer
    return [f"always {words}", code, output]


@pytest.fixture
def cloud(tmp_path):
    """Runs launch/tpu.sh in a clean clone, with a fake gcloud."""
    return Cloud(tmp_path)


class Cloud:
    def __init__(self, folder):
        self.folder, self.notes = folder, folder / "created"
        (folder / "bin").mkdir()
        stand_in = folder / "bin" / "gcloud"
        program = (ROOT / "tests" / "launch_gcloud.py").read_text()
        stand_in.write_text(f"#!{sys.executable} -IS\n{program}")  # -IS shortens the start
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

    def environment(self, **settings):
        return {
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

    def run(self, *words, script="tpu.sh", **settings):
        return subprocess.run(
            ["bash", self.checkout / "launch" / script, *words],
            env=self.environment(**settings),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def interrupt(self, number, *words, script="tpu.sh", after=2, **settings):
        """Starts a script and sends a signal after `after` calls; returns (exit code, stderr)."""

        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                RESTORE_SIGNALS,
                "bash",
                self.checkout / "launch" / script,
                *words,
            ],
            env=self.environment(POLL_S="60", **settings),
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 30
        while len(self.calls()) < after and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)  # lets the script begin its wait
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
        return process.returncode, stderr

    def paste(self, line):
        """Runs a line that a script printed, in a shell without any settings."""
        environment = {k: self.environment()[k] for k in ("PATH", "HOME", "TMPDIR", "GCLOUD")}
        return subprocess.run(
            ["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=60
        )

    def calls(self):
        """Returns (group, verb, all words) of each call."""
        file = self.folder / "calls.jsonl"
        recorded = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )
        return [(words[2], words[3], words) for words in recorded]

    def verbs(self):
        return [verb for _, verb, _ in self.calls()]

    def note(self, provision="spot", maker="create", name="slice"):
        self.notes.mkdir(exist_ok=True)
        (self.notes / name).write_text(f"secret {provision} {maker}\n")


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
    process = cloud.run("create", PROVISION=provision)
    assert process.returncode == 0, process.stderr
    (_, first, _), (second, verb, words) = cloud.calls()
    assert (first, second, verb) == ("describe", group, "create")
    assert ("--spot" in words) == spot
    owner = (cloud.notes / "slice").read_text().split()[0]
    assert f"--labels=disco-jax={owner}" in words and len(owner) == 16
    assert {"--project=project", "--zone=zone", "slice"} <= set(words)


def test_create_takes_no_slice_of_others_and_none_twice(cloud):
    cloud.answer(READY)
    process = cloud.run("create")
    assert process.returncode == 2 and "already exists" in process.stderr
    assert cloud.verbs() == ["describe"] and not list(cloud.notes.glob("*"))
    cloud.note()
    process = cloud.run("create")
    assert process.returncode == 2 and "already created from here" in process.stderr


def test_a_cloud_that_does_not_answer_is_not_an_absent_slice(cloud):
    cloud.answer(["describe", 1, "ERROR: could not resolve host"])
    assert cloud.run("create").returncode == 1
    assert cloud.verbs() == ["describe"] and not list(cloud.notes.glob("*"))
    cloud.note()
    cloud.answer(["describe", 1, "ERROR: could not resolve host"])
    assert cloud.run("delete").returncode == 1
    assert "delete" not in cloud.verbs() and (cloud.notes / "slice").exists()


def test_delete_ends_only_what_was_created_here(cloud):
    process = cloud.run("delete")
    assert (
        process.returncode == 2 and "not created from here" in process.stderr and not cloud.calls()
    )
    cloud.note()
    cloud.answer(READY, ["labels.disco-jax", 0, "another"])
    process = cloud.run("delete")
    assert process.returncode == 2 and "is not the one created from here" in process.stderr
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
    process = cloud.run("setup")
    assert process.returncode == 0, process.stderr
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
    process = cloud.run("setup")
    assert process.returncode == 2 and "uncommitted changes" in process.stderr


def test_a_copy_that_fails_ends_the_setup(cloud):
    cloud.answer(["scp", 1, "ERROR: no route"])
    assert cloud.run("setup").returncode != 0
    assert cloud.verbs() == ["scp"]


def test_run_passes_flags_on_unharmed_and_starts_once(cloud, tmp_path):
    """Executes the command line for gcloud in a shell, as on a machine of the slice."""
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
    (machine / "disco_jax" / "COMMIT").write_text("abc123\n")  # written by `setup`

    def shell():
        return subprocess.run(["bash", "-c", line], cwd=machine, capture_output=True, text=True)

    assert shell().returncode == 0
    again = shell()
    assert again.returncode == 1 and "already in progress" in again.stderr
    for _ in range(100):
        if (machine / "run.rc").exists() and (machine / "run.rc").read_text():
            break
        subprocess.run(["sleep", "0.1"], check=True)
    assert (machine / "run.rc").read_text() == "75\n"
    expected = ["pretrain", "--distributed", "--workdir=gs://bucket/run", *flags, "abc123"]
    assert (machine / "run.log").read_text().splitlines() == expected

    def answer_to(*words):
        """Returns the machine's answer to the query that a command sends."""
        cloud.answer(READY, ["ssh run.rc)", 1, ""])
        cloud.run(*words, MAX_UNREACHABLE="1")
        questions = [w for _, _, words in cloud.calls() for w in words if "run.rc)" in w]
        query = questions[-1].removeprefix("--command=")
        process = subprocess.run(["bash", "-c", query], cwd=machine, capture_output=True, text=True)
        return process.stdout

    (machine / "run.pid").unlink()  # the process may be a zombie here, which `kill -0` finds alive
    assert answer_to("status") == answer_to("babysit", *flags) == "rc=75\n"
    assert answer_to("babysit", "--config=seed") == "rc=none\n"  # the code is of another run


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
        *OWN,
    )
    process = cloud.run("babysit", "--config=disco")
    assert process.returncode == 0, process.stderr
    verbs = [verb for verb in cloud.verbs() if verb != "describe"]
    start = ["scp", "ssh", "ssh"]  # setup and run
    assert verbs == ["delete", "create", "ssh", *start, "ssh", "ssh", *start, "ssh", "delete"]


CREATION = ABSENT, ABSENT, READY, rc("none", "none"), READY


@pytest.mark.parametrize("code", [0, 2, 3])
def test_the_babysitter_deletes_what_it_made_once_whatever_the_exit_code(cloud, code):
    cloud.answer(*CREATION, rc(code, code), *OWN)
    process = cloud.run("babysit", "--config=disco")
    assert process.returncode == code, process.stderr
    assert cloud.verbs().count("create") == cloud.verbs().count("delete") == 1
    assert cloud.verbs()[-1] == "delete" and not (cloud.notes / "slice").exists()
    assert "The slice slice is deleted" in process.stdout
    if code:  # the logs are deleted with the machines
        ssh = [words for _, verb, words in cloud.calls() if verb == "ssh"]
        assert "--command=tail -n 40 run.log" in ssh[-1]


def test_the_babysitter_deletes_what_it_made_when_it_gives_up(cloud):
    cloud.note(maker="babysit")
    label = always(["labels.disco-jax", 0, "secret"])
    cloud.answer(label, always(["describe value(state)", 0, "READY"]), always(rc(1)))
    process = cloud.run("babysit", MAX_RESTARTS="1")
    assert (
        process.returncode == 4 and "Giving up after 1 restarts (last result: 1)" in process.stderr
    )
    assert cloud.verbs().count("delete") == 1 and not (cloud.notes / "slice").exists()


def test_the_babysitter_deletes_what_it_made_when_a_setup_is_refused(cloud):
    """Adds an uncommitted file while the slice is created."""
    stand_in = cloud.folder / "bin" / "gcloud"
    new = cloud.checkout / "launch" / "new.sh"
    text = stand_in.read_text()
    add_file = f"if 'create' in sys.argv: pathlib.Path({str(new)!r}).touch()\n"
    stand_in.write_text(text.replace("answers = ", add_file + "answers = ", 1))
    cloud.answer(*CREATION[:-1], *OWN)
    process = cloud.run("babysit")
    assert process.returncode == 2 and "uncommitted changes" in process.stderr
    assert cloud.verbs().count("delete") == 1 and "scp" not in cloud.verbs()


def test_nothing_is_made_for_changes_that_are_not_committed(cloud):
    (cloud.checkout / "launch" / "new.sh").touch()
    process = cloud.run("babysit")
    assert process.returncode == 2 and "uncommitted changes" in process.stderr and not cloud.calls()


def test_keep_leaves_the_slice_and_says_so(cloud):
    cloud.answer(*CREATION, rc(0, 0))
    process = cloud.run("babysit", KEEP="1")
    assert process.returncode == 0 and "delete" not in cloud.verbs()
    assert "not deleted (KEEP=1), and billing continues" in process.stdout
    cloud.answer(*OWN)
    pasted = cloud.paste(process.stdout.splitlines()[-1])
    assert pasted.returncode == 0, pasted.stderr
    assert cloud.verbs()[-1] == "delete" and not (cloud.notes / "slice").exists()


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("code", [0, 2])
def test_a_slice_that_the_babysitter_did_not_make_is_never_deleted(cloud, noted, code):
    if noted:
        cloud.note()  # by a `create` of its own
    cloud.answer(READY, rc(code))
    process = cloud.run("babysit")
    assert process.returncode == code and "not deleted (it existed before)" in process.stdout
    assert "delete" not in cloud.verbs() and "create" not in cloud.verbs()
    assert (cloud.notes / "slice").exists() == noted


def test_a_deletion_at_the_end_is_tried_again_and_its_failure_told(cloud):
    cloud.note(maker="babysit")
    label = always(["labels.disco-jax", 0, "secret"])
    ready = always(["describe value(state)", 0, "READY"])
    fails = ["tpu-vm delete", 1, "ERROR: no"]
    cloud.answer(label, ready, rc(0), fails)
    process = cloud.run("babysit")
    assert process.returncode == 0 and cloud.verbs().count("delete") == 2
    assert "is deleted" in process.stdout and not (cloud.notes / "slice").exists()
    cloud.note(maker="babysit")
    cloud.answer(label, ready, rc(3), always(fails))
    process = cloud.run("babysit")
    assert process.returncode == 3 and (cloud.notes / "slice").exists()
    assert "not deleted (its deletion failed), and billing continues" in process.stdout


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_an_interrupted_babysitter_deletes_nothing_and_says_what_to_do(cloud, number, code):
    cloud.note(maker="babysit")
    cloud.answer(READY, rc("running"))
    ended, stderr = cloud.interrupt(number, "babysit", "--config=disco", "--config.name=a b")
    assert ended == code and "its run continue, and so does billing" in stderr
    assert "delete" not in cloud.verbs() and (cloud.notes / "slice").exists()
    deletion, resumption = (line for line in stderr.splitlines() if "launch/tpu.sh" in line)
    cloud.answer(READY, rc(0), *OWN[:1], ["labels.disco-jax", 0, "secret"])
    pasted = cloud.paste(f"POLL_S=0 {resumption}")
    assert pasted.returncode == 0 and cloud.verbs().count("delete") == 1, pasted.stderr
    sent = [w for _, verb, words in cloud.calls() if verb == "ssh" for w in words]
    assert any("--config.name=a" in word for word in sent)  # it supervises the same run
    assert deletion.endswith("launch/tpu.sh delete ")


def test_a_babysitter_that_is_interrupted_before_it_made_anything_says_so(cloud):
    cloud.answer(ABSENT, ABSENT, ["create", 1, "ERROR: no capacity"], ABSENT)
    ended, stderr = cloud.interrupt(signal.SIGTERM, "babysit", after=4)
    assert (
        ended == 143 and "No slice was created" in stderr and "launch/tpu.sh delete" not in stderr
    )


@pytest.mark.parametrize(
    "codes",
    [
        (1,), (75, 75), (134, 137), (0, 134), (255,), (139, 134), ("none", 134), (137, 1),
        # The loss of a machine may give the others any exit code.
        (2, "none"), (2, 137), (3, 143), (2, 129, 134),
    ],
    ids=str,
)  # fmt: skip
def test_a_run_starts_again_whatever_a_lost_machine_leaves(cloud, codes):
    cloud.note()
    cloud.answer(READY, rc(*codes), READY, rc(0, 0))
    process = cloud.run("babysit")
    assert process.returncode == 0 and "Starting the run" in process.stdout, process.stderr
    assert cloud.verbs().count("scp") == 1


def test_a_run_that_still_ends_on_one_machine_is_waited_for(cloud):
    cloud.note()
    cloud.answer(READY, rc(134, "running"), READY, rc(134, 1), READY, rc(0, 0))
    process = cloud.run("babysit")
    assert process.returncode == 0 and cloud.verbs().count("scp") == 1


def test_runs_that_fail_at_once_end_the_babysitter(cloud):
    cloud.note()
    cloud.answer(always(READY), always(rc(1)))
    process = cloud.run("babysit", MAX_QUICK="3")
    assert (
        process.returncode == 4
        and "3 consecutive runs failed within 600 s (last result: 1)" in process.stderr
    )
    assert cloud.verbs().count("scp") == 3
    cloud.answer(*[READY, rc(75)] * 5, READY, rc(0))
    assert cloud.run("babysit", MAX_QUICK="2").returncode == 0  # preemptions are no failures


def test_a_machine_that_does_not_answer_for_long_is_lost(cloud):
    silent = always(["ssh run.rc)", 255, "ERROR: connection timed out"])
    cloud.answer(always(READY), silent)
    process = cloud.run("babysit", MAX_UNREACHABLE="3")
    assert process.returncode == 4 and "does not respond" in process.stderr
    assert "delete" not in cloud.verbs()  # not its own
    cloud.note(maker="babysit")
    unreachable = ["ssh run.rc)", 255, "ERROR: connection timed out"]
    label = ["labels.disco-jax", 0, "secret"]
    again = READY, label, ABSENT, ABSENT, READY, rc(0), *OWN
    cloud.answer(*[READY, unreachable] * 3, *again)
    process = cloud.run("babysit", MAX_UNREACHABLE="3")
    assert process.returncode == 0 and "recreating the slice" in process.stderr, process.stderr
    assert [v for v in cloud.verbs() if v in ("create", "delete")] == ["delete", "create", "delete"]


def test_a_lost_process_beside_one_that_is_done_is_no_end(cloud):
    cloud.note()
    cloud.answer(READY, ["ssh run.rc)", 0, "rc=0\nrc=134"], READY, ["ssh run.rc)", 0, "rc=0\nrc=0"])
    process = cloud.run("babysit")
    assert process.returncode == 0 and "Starting the run (previous result: 134)" in process.stdout
    assert cloud.verbs() == ["describe", "ssh", "scp", "ssh", "ssh", "describe", "ssh"]


@pytest.mark.parametrize("code, ends", [(2, 2), (3, 3)])
def test_the_babysitter_does_not_repeat_a_mistake(cloud, code, ends):
    cloud.note()
    cloud.answer(READY, ["ssh run.rc)", 0, f"rc=134\nrc={code}"])
    process = cloud.run("babysit")
    assert process.returncode == ends and "would not help" in process.stderr
    assert cloud.verbs() == ["describe", "ssh", "ssh"]  # the last one shows the logs


def test_the_babysitter_gives_up_after_so_many_restarts(cloud):
    cloud.note()
    cloud.answer(["always describe value(state)", 0, "READY"], ["always ssh run.rc)", 0, "rc=1"])
    process = cloud.run("babysit", MAX_RESTARTS="2")
    assert process.returncode == 4
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
        *OWN,
    )
    process = cloud.run("babysit", PROVISION="queued-spot")
    assert process.returncode == 0, process.stderr
    changes = [(g, v) for g, v, _ in cloud.calls() if v in ("create", "delete")]
    assert changes == [("queued-resources", verb) for verb in ("delete", "create", "delete")]


def test_no_capacity_is_no_reason_to_give_up(cloud):
    cloud.answer(
        ABSENT, ABSENT, ["create", 1, "ERROR: no capacity"], ABSENT,
        ABSENT, ABSENT, ["create", 0, ""], READY, ["ssh run.rc)", 0, "rc=0"], *OWN,
    )  # fmt: skip
    process = cloud.run("babysit")
    assert process.returncode == 0, process.stderr
    assert cloud.verbs().count("create") == 2


@pytest.mark.parametrize(
    "words",
    [
        "create", "setup", "run --config=disco", "logs 3", "status", "fetch here", "list",
        "delete", "babysit",
    ],
)  # fmt: skip
def test_a_dry_run_prints_what_a_shell_could_run_and_does_nothing(cloud, words):
    process = cloud.run("--dry-run", *words.split())
    assert process.returncode == 0 and not cloud.calls() and not cloud.notes.exists(), (
        process.stderr
    )
    count = "gcloud() { echo one; }; git() { :; }; mkdir() { :; }; "
    ran = subprocess.run(["bash", "-euc", count + process.stdout], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.startswith("one"), ran.stderr


@pytest.mark.parametrize(
    "maker, keep, expected",
    [
        (None, "", ["create", "scp", "ssh", "ssh", "delete"]),
        (None, "1", ["create", "scp", "ssh", "ssh"]),
        ("babysit", "", ["scp", "ssh", "ssh", "delete"]),
        ("create", "", ["scp", "ssh", "ssh"]),
    ],
)
def test_a_dry_run_prints_what_babysit_would_do(cloud, maker, keep, expected):
    if maker:
        cloud.note(maker=maker)
    process = cloud.run("--dry-run", "babysit", "--config=disco", KEEP=keep)
    assert process.returncode == 0 and not cloud.calls(), process.stderr
    say = "gcloud() { echo $4; }; git() { :; }; "
    ran = subprocess.run(["bash", "-euc", say + process.stdout], capture_output=True, text=True)
    assert ran.stdout.split() == expected
    assert (cloud.notes / "slice").exists() == bool(maker)


def test_other_commands_ask_for_what_they_say(cloud):
    cloud.run("logs", "3")
    assert {"--worker=3", "--command=tail -n 100 -F run.log"} <= set(cloud.calls()[-1][2])
    cloud.run("fetch", str(cloud.folder / "there"))
    assert cloud.calls()[-1][2][:3] == ["storage", "rsync", "--recursive"]
    cloud.answer(READY, ["ssh run.rc)", 0, "rc=running\nrc=75"])
    assert cloud.run("status").stdout.splitlines() == ["slice: READY", "run: running"]


@pytest.mark.parametrize(
    "words, settings, message",
    [
        (["create"], {"PROJECT": ""}, "PROJECT is empty"),
        (["run"], {"WORKDIR": ""}, "WORKDIR is empty"),
        (["create"], {"PROVISION": "free"}, "PROVISION=free is not one of"),
        (["create", "now"], {}, "takes no arguments: now"),
        (["fetch"], {}, "fetch takes one directory"),
        (["crate"], {}, "launch/tpu.sh [--dry-run] create"),
    ],
)
def test_mistakes_are_told(cloud, words, settings, message):
    process = cloud.run(*words, **settings)
    assert process.returncode == 2 and message in process.stderr
    assert not cloud.calls()


def test_hosts_are_given_their_places():
    process = subprocess.run(
        ["bash", ROOT / "launch" / "hosts.sh", "--dry-run", "a,b", "pretrain", "--config.name=x y"],
        check=True,
        capture_output=True,
        text=True,
    )
    first, second = (shlex.split(line) for line in process.stdout.splitlines())
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
    process = cloud.run("2", "--config=sweeps/seed", script="sweep.sh", LOGS_DIR=str(logs))
    assert process.returncode == 3
    assert "share 1 exited with code 3" in process.stderr and "share 0 exited" not in process.stderr
    assert "finished" in (logs / "slice-0.log").read_text()
    named = {word for _, _, words in cloud.calls() for word in words if word.startswith("slice")}
    assert named == {"slice-0", "slice-1"}


def test_a_sweep_deletes_each_slice_that_it_made_once(cloud):
    for i in (0, 1):
        cloud.note(maker="babysit", name=f"slice-{i}")
    cloud.answer(
        always(["slice-1 run.rc)", 0, "rc=3"]),
        always(["run.rc)", 0, "rc=0"]),
        always(["describe value(state)", 0, "READY"]),
        always(["labels.disco-jax", 0, "secret"]),
    )
    settings = dict(script="sweep.sh", LOGS_DIR=str(cloud.folder / "logs"))
    assert cloud.run("2", "--config=sweeps/seed", KEEP="1", **settings).returncode == 3
    assert "delete" not in cloud.verbs()
    assert cloud.run("2", "--config=sweeps/seed", **settings).returncode == 3
    deleted = [words[4] for _, verb, words in cloud.calls() if verb == "delete"]
    assert sorted(deleted) == ["slice-0", "slice-1"] and not list(cloud.notes.iterdir())


def test_an_interrupted_sweep_ends_its_babysitters_and_says_what_to_do(cloud):
    for i in (0, 1):
        cloud.note(maker="babysit", name=f"slice-{i}")
    cloud.answer(always(["run.rc)", 0, "rc=running"]), always(["describe state", 0, "READY"]))
    logs = cloud.folder / "logs"
    words = "2", "--config=sweeps/seed"
    code, stderr = cloud.interrupt(
        signal.SIGTERM, *words, script="sweep.sh", after=4, LOGS_DIR=str(logs)
    )
    assert code == 143 and "delete" not in cloud.verbs()
    for i in (0, 1):
        assert "Interrupted" in (logs / f"slice-{i}.log").read_text()
        assert any(f"NAME=slice-{i}" in x and "tpu.sh delete" in x for x in stderr.splitlines())
    assert "launch/sweep.sh 2 --config=sweeps/seed" in stderr.splitlines()[-1]


def test_a_dry_run_of_a_sweep_prints_each_share(cloud):
    process = cloud.run("--dry-run", "2", "--config=sweeps/seed", script="sweep.sh")
    assert process.returncode == 0, process.stderr
    assert not cloud.calls()
    for i in (0, 1):
        assert f"slice-{i}" in process.stdout and f"--worker={i}" in process.stdout
    assert sum("--workers=2" in line for line in process.stdout.splitlines()) == 2
    assert "sweep --distributed" in process.stdout.replace("\\", "")
    for words in ((), ("0",), ("two",)):
        refused = cloud.run(*words, script="sweep.sh")
        assert refused.returncode == 2 and "usage: launch/sweep.sh" in refused.stderr
