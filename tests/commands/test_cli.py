"""Tests of the command line: one clear message per mistake, exit code 2, no files written."""

import numpy as np
import pytest

import helpers
from disco_jax import flags, main


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, **helpers.digits())
    return str(path)


@pytest.fixture
def fails(tmp_path, capsys, monkeypatch):
    """A function that runs an invalid command line and returns its error message."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))

    def run(*words):
        code = main.main([*words, "--workdir=run"] if words[0] in main.TASKS else words)
        message = capsys.readouterr().err
        assert code == 2, message
        assert "Traceback" not in message
        assert not (tmp_path / "run").exists()
        return message

    return run


SMOKE = "pretrain", "--config=disco:student=resnet8,teacher=resnet8,data=digits,smoke=true"


@pytest.mark.parametrize(
    "words, says",
    [
        (("pretrian",), ["'pretrian' is not known", "Did you mean 'pretrain'"]),
        (("pretrain",), ["--config is missing", "configs/disco.py"]),
        (("pretrain", "--config=configs/disko.py"), ["Did you mean 'disco'"]),
        (("pretrain", "--config=disco:studnt=resnet18"), ["'studnt'", "Did you mean 'student'"]),
        (("pretrain", "--config=disco:smoke=perhaps"), ["smoke=true or false"]),
        ((*SMOKE, "--wrkdir=x"), ["wrkdir"]),
        (
            (*SMOKE, "--config.student.backbon=resnet18", "--config.objectives.distil.weight=1"),
            [
                "config.student.backbon", "'student.backbone'",
                "config.objectives.distil.weight", "'objectives.distill.weight'",
            ],
        ),
        (
            (*SMOKE, "--config.batch_size=many"),
            ["config.batch_size='many' must be a whole number from 1"],
        ),
        (
            (*SMOKE, "--config.zzz=1"),
            ["--config.zzz is not a field", "`disco-jax list --settings` shows all fields"],
        ),
        (
            (*SMOKE, "--config.student=resnet18"),
            ["--config.student is not a field", "group", "e.g. --config.student."],
        ),
        ((*SMOKE, "--config.learning_rate.base_lr=inf"), ["base_lr=inf must be a finite number"]),
        ((*SMOKE, "--config.health.min_std=nan"), ["min_std=nan must be a finite number"]),
        ((*SMOKE, f"--config.student.width={2**63}"), ["width=9223372036854775808 must be"]),
        ((*SMOKE, "--config.optimizer.frozen=1"), ["frozen=(1,) must be a tuple", "text"]),
        ((*SMOKE, "--config.objectives.contrast.pairs={}"), ["contrast.pairs=() must be"]),
        ((*SMOKE, "--config.objectives.similarity.groups=xxxx"), ["groups=('xxxx',) must be"]),
        ((*SMOKE, "--config.teacher.prototypes=('a',)"), ["prototypes=('a',) must be a tuple"]),
        ((*SMOKE, f"--config.data.dir={'x' * 3000}"), ["config.data.dir='xxx", "at most"]),
        (
            ("pretrain", "--config=knn"),
            ["cannot be used with `disco-jax pretrain`", "it has no config.augment"],
        ),
        (("knn", "--config=moco_v2"), ["cannot be used with `disco-jax knn`", "config.network"]),
        (("sweep", "--config=disco"), ["cannot be used with `disco-jax sweep`", "config.axes"]),
        (
            # All kinds of mistakes: flag, field, type, range, name, combination of fields.
            (
                *SMOKE, "--wrkdir=x", "--config.student.backbon=resnet18", "--config.seed=many",
                "--config.views=0", "--config.student.backbone=resnet19",
                "--config.batch_size=6", "--config.optimizer.frozen_steps=1",
                "--config.optimizer.frozen_epochs=1", "--config.data.source=npz",
                "--config.data.dir=no/such",
            ),
            [
                "wrkdir", "config.student.backbon ", "config.seed='many'", "config.views=0",
                "'resnet19'", "config.batch_size=6 is not a multiple", "frozen_steps=1",
                "no/such",
            ],
        ),
        (
            (*SMOKE, "--config.batch_size=0", "--config.student.backbone=resnet19"),
            ["config.batch_size=0 must be", "'resnet19'", "Did you mean 'resnet1"],
        ),
        (
            (
                *SMOKE, "--config.objectives.contrast.queue_size=100",
                "--config.objectives.distill.views=(0,7)", "--config.teacher.weights=/no/such",
                "--config.checkpoint.best_metric=los", "--config.monitor.knn_every_steps=1",
                "--config.monitor.k=400",
            ),
            [
                "queue_size=100", "distill reads view 7", "'/no/such' does not exist",
                "config.monitor.k=400",
            ],
        ),
        (
            (*SMOKE, "--config.bags.file=no.npz", "--config.checkpoint.best_metric=los"),
            ["config.bags.file='no.npz' does not exist", "Did you mean 'loss'"],
        ),
        ((*SMOKE, "--config.student.backbone=resnet17"), ["resnet17", "Did you mean 'resnet1"]),
        ((*SMOKE, "--config.batch_size=6"), ["config.batch_size=6", "4 devices", "4, 8"]),
        (
            (*SMOKE, "--config.objectives.contrast.queue_size=100"),
            ["queue_size=100", "96, 104"],
        ),
        (
            (*SMOKE, "--config.log.every_steps=0", "--config.momentum.ema_rate=2.0"),
            [
                "config.log.every_steps=0 must be a whole number from 1",
                "config.momentum.ema_rate=2.0 must be a finite number from 0 to 1",
            ],
        ),
        ((*SMOKE, "--config.checkpoint.best_metric=los"), ["Did you mean 'loss'"]),
        ((*SMOKE, "--config.student.norm_group=3"), ["norm_group=3", "1, 2"]),
        ((*SMOKE, "--config.augment.interpolation=cubic"), ["interpolation", "bicubic"]),
        ((*SMOKE, "--config.local.count=1"), ["makes view 2, which no objective reads"]),
        ((*SMOKE, "--config.local.count=1", "--config.local.size=0"), ["config.local.size=0"]),
        ((*SMOKE, "--config.data.source=tdfs"), ["config.data.source", "Did you mean 'tfds'"]),
        ((*SMOKE,), ["config.data.name='digits' is not prepared", "tfds build"]),
        ((*SMOKE, "--config.data.name=imagenet2012"), ["ILSVRC2012_img_train.tar"]),
        ((*SMOKE, "--config.teacher.weights="), ["config.teacher.weights is empty"]),
        ((*SMOKE, "--config.teacher.weights=/no/such"), ["'/no/such' does not exist"]),
        ((*SMOKE, "--config.dtype=float16"), ["config.dtype='float16'"]),
        ((*SMOKE, "--config.optimizer.name=adam"), ["config.optimizer.name='adam'"]),
        (("knn",), ["is not a run directory"]),
        (("linear",), ["is not a run directory"]),
        (("semi",), ["is not a run directory"]),
        (("tsne",), ["is not a run directory"]),
        (("semi", "--config=semi:percent=5"), ["percent=5 must be 1 or 10"]),
        (("knn", "--config=knn:protocol=sead"), ["Did you mean 'seed'"]),
        (("knn", "--config.k=x"), ["config.k"]),
        (("distill", "--data=x"), ["--teacher, --student missing"]),
        (
            ("distill", "--data=x", "--teacher=y", "--student=resnet19"),
            ["--student='resnet19'", "resnet18"],
        ),
        (("distill", "--data=x", "--teacher=y", "--student=resnet18"), ["--data=x does not exist"]),
    ],
    ids=lambda value: " ".join(value)[-60:],
)  # fmt: skip
def test_a_mistake_gets_one_clear_message(fails, digits_file, words, says):
    has_data = words == SMOKE or any("data." in word for word in words)
    if words[: len(SMOKE)] == SMOKE and not has_data:
        words = (*words, "--config.data.source=npz", f"--config.data.dir={digits_file}")
    message = fails(*words)
    for part in says:
        assert part in message


def test_a_recipe_is_a_python_file(fails, tmp_path):
    file = tmp_path / "config.json"
    file.write_text("{}")
    message = fails("pretrain", f"--config={file}")
    assert f"--config={file} is not a recipe: give a Python file" in message


@pytest.mark.parametrize(
    "text, line, says",
    [
        ("def get_config(arg=None):\n    return (\n", 2, "SyntaxError: '(' was never closed"),
        ("import no_such_module\n", 1, "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config(arg=None):\n    return confg\n", 2, "NameError: name 'confg'"),
        (
            "from disco_jax.configs import common\n\n\ndef get_config(arg=None):\n"
            "    config = common.pretrain()\n    config.batch_size = 'many'\n    return config\n",
            6,
            "TypeError",
        ),
    ],
)
def test_a_mistake_inside_a_recipe_is_told_with_its_line(fails, tmp_path, capsys, text, line, says):
    file = tmp_path / "mine.py"
    file.write_text(text)
    message = fails("pretrain", f"--config={file}")
    assert f"{file}:{line}: {says}" in message and len(message.splitlines()) == 1
    assert f"mine.py:{line}: {says}" in fails("pretrain", "--config=mine.py")
    assert main.main(["pretrain", f"--config={file}", "--workdir=run", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, says",
    [
        ("def get_config(arg=None):\n    pass\n", "must return a ConfigDict, not None"),
        ("def get_config():\n    pass\n", "TypeError: get_config() takes 0 positional arguments"),
        ("config = 1\n", "has no get_config function"),
        (
            "from disco_jax.configs import disco\n\n\ndef get_config(arg=None):\n"
            "    config = disco.get_config('smoke=true,data=digits')\n"
            "    config.objectives.contrast.temprature = 0.1\n    return config\n",
            "not a field of a pretraining config. Did you mean 'objectives.contrast.temperature'",
        ),
    ],
)
def test_a_recipe_that_is_none_is_told(fails, tmp_path, text, says):
    file = tmp_path / "mine.py"
    file.write_text(text)
    assert says in fails("pretrain", f"--config={file}")


def test_workdir_must_be_given_and_hides_nothing(capsys):
    assert main.main([*SMOKE, "--config.seed=x"]) == 2
    message = capsys.readouterr().err
    assert "--workdir is missing" in message and "config.seed='x'" in message


def test_overrides_reach_the_config_with_their_types():
    config = helpers.flags_config(
        [*SMOKE, "--workdir", "x", "--config.objectives.distill.views=(1,)", "--config.seed", "3"]
    )
    assert config.objectives.distill.views == (1,) and config.seed == 3


@pytest.mark.parametrize("name", sorted(flags.recipes()))
def test_recipes_are_found_by_path_and_by_name_in_any_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert flags.load(f"configs/{name}.py") == flags.load(name)


def test_every_task_has_its_help(capsys):
    for task in main.TASKS:
        assert main.main([task, "--help"]) == 0
        word = {
            "list": "--sizes",
            "export": "--format",
            "embed": "--images",
            "data": "--limit",
            "compare": "--output",
        }.get(task, "--workdir")
        assert word in capsys.readouterr().out


def test_list_names_what_there_is(capsys):
    assert main.main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("configs/disco.py", "config.objectives.similarity", "resnet34", "fashion_mnist"):
        assert name in out
    needs = {line.split()[0]: line for line in out.splitlines() if " crop" in line and ";" in line}
    assert set(needs) == {
        f"configs/{name}.py" for name in flags.recipes() if "objectives" in flags.load(name)
    }
    # 65,536 keys of 128 float32 and a pointer of four bytes; RETRO has two queues.
    assert "2 crops; student 2, momentum 1, teacher 2; 32 MiB" in needs["configs/disco.py"]
    assert "student 2, momentum 2, teacher 2; 64 MiB" in needs["configs/retro.py"]
    assert "the teacher's head" in needs["configs/retro.py"]
    assert "1 crop; student 1; 0 MiB; needs bags" in needs["configs/pseudo_labels.py"]
    assert "student 1, momentum 1; 32 MiB" in needs["configs/moco_v2.py"]
    assert "needs" not in needs["configs/moco_v2.py"]
