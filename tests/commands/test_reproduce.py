"""Tests of `disco-jax reproduce`: cells are listed, described, trained and scored."""

import json

import numpy as np
import pytest

import helpers
from disco_jax import flags, main, models
from disco_jax.commands import linear, reproduce
from disco_jax.evaluate import saved
from disco_jax.report import paper, rows
from disco_jax.train import teacher
from disco_jax.workflows import pretrain

CELL = "disco/table1/resnet18/resnet50"


def call(capsys, *words):
    """Returns exit code, standard output and standard error of `disco-jax reproduce`."""
    code = main.main(["reproduce", *words])
    return code, *capsys.readouterr()


def test_tables_and_cells_are_listed_with_their_states(capsys):
    code, out, _ = call(capsys)
    assert code == 0 and len(out.splitlines()) == len(rows.tables()) + 1
    assert "disco/table3" in out and "0 of 12 run" in out
    _, out, _ = call(capsys, "disco/table1")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "60.6 / 83.7" in lines[CELL] and lines[CELL].endswith("runs")
    _, out, _ = call(capsys, CELL)
    assert "recipe: disco:student=resnet18,teacher=resnet50" in out
    assert "evaluation: linear:protocol=disco,student=resnet18" in out
    _, out, _ = call(capsys, "disco/table3")
    assert out.count("missing: detection") == 12


@pytest.mark.parametrize(
    "words, message",
    [
        (("disco/table1/resnet81/resnet50",), "Nearest: disco/table1/resnet18/resnet50, "),
        (("disco/table11", "--dry-run"), "Nearest: disco/table1"),
        (("disco/table1", "--dry-run"), "has 32 cells; give one of them"),
        (("disco/table3/resnet34/none/voc", "--dry-run"), "Missing: detection"),
        (("disco/figure1/plot", "--dry-run"), "is drawn from other cells (runs of disco/table1)"),
        ((CELL, "--workdir=W"), "--teacher=WEIGHTS: a run or a checkpoint of resnet50 by MoCo-v2"),
        ((CELL, "--workdir=W"), "`disco-jax reproduce disco/teachers/resnet50` trains it"),
        (("retro/table2/resnet18/moco_v2_none/10", "--workdir=W"), "list of 128116 images"),
        (("disco/table2/resnet18/kd", "--workdir=W"), "--classifier=RUN/NAME"),
        (("seed/table4/resnet18/kmeans_4096", "--workdir=W"), "--config.bags.file=FILE"),
        ((CELL, "--workdir=W", "--config.student.backbone=resnet34"), "is of resnet18"),
        ((CELL, "--workdir=W", "--config.total_epoch=3"), "Did you mean 'total_epochs'"),
    ],
)
def test_mistakes_are_named_and_nothing_is_trained(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "run", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(flags, "prepare_jax", lambda *_: None)
    code, _, err = call(capsys, *words)
    assert code == 2 and message in err
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_settings_and_needs(capsys):
    code, out, _ = call(capsys, CELL, "--dry-run", "--config.data.dir=gs://bucket")
    assert code == 0 and "needs: --teacher=WEIGHTS" in out
    config = json.loads(out[out.index("config: ") + len("config: ") :])
    assert (config["data"]["dir"], config["total_epochs"]) == ("gs://bucket", 200)
    _, out, _ = call(capsys, CELL, "--dry-run", "--teacher=runs/mine")
    assert "needs: nothing more" in out and '"weights": "runs/mine"' in out


def test_cells_with_few_labels_read_the_papers_list():
    row = rows.find("retro/table2/resnet18/moco_v2_none/10")
    listed = reproduce.evaluation_of(row, labelled="10percent.txt")
    assert (listed.data.subset, listed.labelled.percent, listed.labelled.listed) == (
        "10percent.txt", 0.0, 128_116,
    )  # fmt: skip
    tfds = reproduce.evaluation_of(row, labelled="tfds")
    assert (tfds.data.name, tfds.data.subset) == ("imagenet2012_subset/10pct", "")
    expected = paper.evaluation_fields(row.evaluation.config(), paper=True)
    assert paper.evaluation_fields(listed) == paper.evaluation_fields(tfds) == expected


@pytest.mark.wiring  # compares which parts run, not scores
def test_a_cell_is_trained_and_scored_once(capsys, monkeypatch, tmp_path):
    digits = {key: value[:48] for key, value in helpers.digits().items()}
    np.savez(tmp_path / "few.npz", **digits)
    monkeypatch.setitem(models.BACKBONES, "resnet18", (helpers.TinyBackbone, {}))
    row = rows.find("disco/table1/resnet18/none")
    config = helpers.only_cropped(row.config(smoke=True))
    config.augment.size = 16
    config.data.update(source="npz", dir=str(tmp_path / "few.npz"), eval_split="test")
    config.log.update(report=False, tensorboard=False)
    evaluation = reproduce.evaluation_of(row)
    evaluation.update(total_epochs=1, report=False, batch_size=16)
    workdir = str(tmp_path / "cell")
    summary = reproduce.run(row, config, evaluation, workdir)
    out = capsys.readouterr().out
    assert "Not the paper's experiment: " in out and "total_steps: 2, paper 0" in out
    result = json.loads((tmp_path / "cell" / "linear_disco.json").read_text())
    assert result["settings"]["learning_rate"]["base_lr"] == 30.0
    monkeypatch.setattr(linear, "run", lambda *_: pytest.fail("evaluated again"))
    assert reproduce.run(row, config, evaluation, workdir) == summary
    out = capsys.readouterr().out
    assert "is finished: 2 of 2 steps" in out
    assert f"top-1 {result['top1']:.2f}, printed 52.2 / 77.6" in out
    assert summary == {"row": row.id, "top1": result["top1"], "printed": None}


def test_the_papers_experiment_is_compared_with_its_value(capsys, monkeypatch, tmp_path):
    """Replaces the trained run by its files."""
    row = rows.find(CELL)
    config = row.config()
    own = row.teacher.config()
    config.teacher.update(teacher.shape(own.student), weights="moco_v2_200ep_pretrain.pth.tar")
    config.teacher.update(mean=own.augment.mean, std=own.augment.std)
    result = {"top1": 59.5, "data": "imagenet2012", **saved.settings(row.evaluation.config())}
    (tmp_path / "config.json").write_text(config.to_json_best_effort())
    (tmp_path / "linear_disco.json").write_text(json.dumps(result))
    monkeypatch.setattr(pretrain, "run", lambda *_: None)
    summary = reproduce.run(row, config, reproduce.evaluation_of(row), str(tmp_path))
    assert summary == {"row": CELL, "top1": 59.5, "printed": 60.6}
    assert f"{CELL}: top-1 59.50, printed 60.6 / 83.7\n" == capsys.readouterr().out
