"""Tests of sweeps: cells are trained, evaluated and tabulated, and restarts resume."""

import csv
import dataclasses
import json
import types

import numpy as np
import pytest

import helpers
from disco_jax import flags
from disco_jax.commands import sweep
from disco_jax.configs.sweeps import common
from disco_jax.errors import Preempted, UserError
from disco_jax.evaluate import saved
from disco_jax.plan import budget
from disco_jax.report import runs
from disco_jax.run import lease
from disco_jax.sweeps import cells, table
from disco_jax.train import experiment, teacher
from disco_jax.workflows import joint_runs, pretrain, scoring

# Checks which cells are trained, evaluated, dropped and tabulated, for any scores.
pytestmark = pytest.mark.wiring


@pytest.fixture(scope="module", autouse=True)
def shared_programs(tmp_path_factory):
    """Enables the compilation cache, as the command line does."""
    with helpers.programs_kept(tmp_path_factory.mktemp("programs")), helpers.tiny_networks():
        yield


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, **helpers.digits())
    return path


def small(digits_file, **changes):
    """Returns a sweep of two recipes x two widths with its own teacher."""
    config = flags.load("sweeps/hidden_width:smoke=true")
    config.axes = (("recipe", RECIPES), ("config.student.hidden", (8, 16)))
    config.teachers = {
        "small": common.teacher("resnet8", recipe=f"moco_v2:{GIVEN}", changes=(("seed", 7),))
    }
    config.teacher = "small"
    config.changes = (
        *config.changes,
        ("student.backbone", "tiny"),
        ("data.source", "npz"),
        ("data.dir", str(digits_file)),
        ("log.report", False),
        ("checkpoint.every_steps", 1),
        *((f"augment.{name}_prob", 0.0) for name in ("jitter", "grey", "blur")),
    )
    config.evaluate = (("knn", (("report", False),)),)
    config.figure.score = "knn"
    config.update(changes)
    return config


GIVEN = "student=resnet8,data=digits,smoke=true"
RECIPES = (f"moco_v2:{GIVEN}", f"disco:{GIVEN}")


def test_cells_are_the_product_of_the_axes():
    config = flags.load("sweeps/hidden_width")
    expanded = cells.expand(config)
    second = expanded[1]
    assert len(expanded) == 35
    assert second.name == "student=resnet18,hidden=512"
    assert (second.config.student.backbone, second.config.student.hidden) == ("resnet18", 512)
    assert {cell.config.name for cell in expanded} == {"disco"}
    config.seeds = (0, 1)
    assert [cell.config.seed for cell in cells.expand(config)[:2]] == [0, 1]
    assert cells.expand(config)[0].row == cells.expand(config)[1].row


def test_further_products_stand_below_the_first(digits_file):
    config = small(digits_file, seeds=(0, 1))
    config.arguments = (("data", "digits"), ("smoke", "true"), ("student", "resnet8"))
    config.axes = (("recipe", ("moco_v2",)),)
    config.further = ((("recipe", ("disco",)), ("config.student.hidden", (8, 16))),)
    expanded = cells.expand(config)
    assert [cell.name for cell in expanded[::2]] == [
        "recipe=moco_v2,seed=0",
        "recipe=disco,hidden=8,seed=0",
        "recipe=disco,hidden=16,seed=0",
    ]
    assert {cell.config.data.name for cell in expanded} == {"digits"}
    rows = table.rows(expanded, {c.name: 1 for c in expanded}, {}, {})
    head, lines = table.lines(rows, ["knn"])
    assert head[:2] == ["recipe", "student.hidden"]
    assert [line[:2] for line in lines] == [["moco_v2", ""], ["disco", "8"], ["disco", "16"]]
    config.further = (*config.further, config.axes)
    with pytest.raises(UserError, match="'recipe=moco_v2,seed=0' twice"):
        cells.expand(config)


def test_a_teachers_own_changes_come_last(digits_file):
    config = small(digits_file)
    config.changes = (*config.changes, ("total_steps", 5))
    config.teachers.small.changes = (("total_steps", 9),)
    teacher = cells.teachers(config, cells.expand(config))["small"]
    assert (teacher.total_steps, teacher.student.width) == (9, 4)


def test_a_baseline_has_no_teacher(digits_file):
    by_name = {cell.name: cell for cell in cells.expand(small(digits_file))}
    assert [bool(cell.teacher) for cell in by_name.values()] == [False, False, True, True]
    assert next(iter(by_name)) == "recipe=moco_v2:student=resnet8_data=digits_smoke=true,hidden=8"


BAD = {
    "no axes": (dict(axes=()), "nothing to sweep over"),
    "not values": (dict(axes=(("student", "resnet18"),)), "needs a name and its values"),
    "twice": (dict(axes=(("config.student.hidden", (8, 8)),)), "twice"),
    "no field": (dict(axes=(("config.student.hiden", (8,)),)), "Did you mean 'student.hidden'"),
    "no argument": (dict(axes=(("students", ("resnet8",)),)), "Did you mean 'student'"),
    "type": (dict(axes=(("config.student.hidden", ("wide",)),)), "student.hidden='wide'"),
    "no teacher": (dict(teacher="large"), "The teacher of a cell.*small"),
    "evaluation": (dict(evaluate=("kn",)), "Did you mean 'knn'"),
    "figure": (dict(figure=dict(x="width", score="knn")), "config.figure.x"),
    "score": (dict(figure=dict(x="", score="top1")), "config.figure.score"),
    "joint": (dict(joint=0), "1 or more"),
    "method": (
        dict(
            axes=(("config.objectives.contrast.queue_size", (33,)),), figure=dict(x="", score="knn")
        ),
        "Cell queue_size=33: .*not a multiple",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_refused_before_anything_is_trained(name, digits_file, tmp_path):
    changes, message = BAD[name]
    with pytest.raises(UserError, match=message):
        config = small(digits_file)
        config.recipe = RECIPES[1]
        for field, value in changes.items():
            config[field] = value
        sweep.run(config, str(tmp_path / "sweep"))
    assert not (tmp_path / "sweep").exists()


def test_a_teacher_without_weights_or_recipe_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--config.teachers.resnet50.weights"):
        sweep.run(flags.load("sweeps/hidden_width"), str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [n for folder in flags.FOLDERS[1:] for n in flags.recipes(folder)])
def test_shipped_sweeps_build(name):
    """Builds the method of every cell of every shipped sweep."""
    config = flags.load(name)
    for spec in config.teachers.values():
        spec.weights = spec.weights or "random"
    expanded = cells.expand(config)
    assert sum(map(len, sweep._groups(sweep._assemble(expanded), 8))) == len(expanded)


def test_seeds_strategies_may_have_labels_of_k_means():
    config = flags.load("sweeps/seed:axis=strategy,bags=runs/clusters/bags.npz")
    config.teachers.resnet50.weights = "random"
    last = cells.expand(config)[-1].config
    assert (last.name, last.bags.file) == ("pseudo_labels", "runs/clusters/bags.npz")
    assert last.student.backbone == "resnet18"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits_file):
    """A sweep that was stopped in its second group and resumed."""
    folder = tmp_path_factory.mktemp("sweep")
    config = small(digits_file)
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_, **__):
            raise Preempted("stopped")

        patch.setattr(joint_runs, "run", stopping_after(1, joint_runs.run, stop))
        with pytest.raises(Preempted):
            sweep.run(config, str(folder))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/config.json")}
    first = [*folder.glob("status/*.json")]
    result = sweep.run(config, str(folder))
    return folder, result, before, first


def stopping_after(count, real, stop):
    calls = []

    def run(*args, **rest):
        calls.append(1)
        return (real if len(calls) <= count else stop)(*args, **rest)

    return run


def rows_of(folder):
    return list(csv.DictReader((folder / "table.csv").read_text().splitlines()))


def test_a_worker_that_runs_already_is_refused(finished, digits_file):
    folder = str(finished[0])
    with lease.held(finished[0], "lock_0_of_1"):
        with pytest.raises(UserError, match="Another run is writing"):
            sweep.run(small(digits_file), folder)
        assert sweep.run(small(digits_file), folder, worker=1, workers=2)["done"] == 4


def test_all_cells_are_trained_scored_and_tabulated(finished):
    folder, result, before, first = finished
    assert (result["cells"], result["done"], result["failed"]) == (4, 4, {})
    assert len(first) == 3  # the teacher and the first group
    for path, modified in before.items():  # finished runs are not written again
        assert path.stat().st_mtime_ns == modified
    lines = rows_of(folder)
    assert [line["student.hidden"] for line in lines] == ["8", "16", "8", "16"]
    for line in lines:
        assert line["seeds"] == "1/1"
        name = f"recipe={cells._slug(line['recipe'])},hidden={line['student.hidden']}"
        scores = json.loads((folder / "cells" / name / "knn.json").read_text())
        assert float(line["knn top-1 (%)"]) == pytest.approx(scores["top1"], abs=1e-3)
    assert "<table>" in (folder / "table.html").read_text()
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")


def test_the_teacher_is_the_sweeps_own(finished):
    folder = finished[0]
    cell = next(folder.glob("cells/recipe=disco*hidden=8/config.json"))
    spec = json.loads(cell.read_text())["teacher"]
    assert spec["weights"] == str(folder / "teachers" / "small")
    config = json.loads((folder / "teachers" / "small" / "config.json").read_text())
    assert (config["name"], config["seed"]) == ("moco_v2", 7)
    assert (folder / "teachers" / "small" / "knn.json").exists()


def test_a_cell_that_diverges_is_left_out(digits_file, tmp_path):
    """Checks that the other cells of its group are trained and evaluated."""
    config = small(digits_file, teacher="", teachers={})
    config.recipe = RECIPES[0]
    config.axes = (("config.learning_rate.base_lr", (1e30, 0.01)),)
    config.figure.x = "config.learning_rate.base_lr"
    config.changes = (*config.changes, ("total_steps", 4))
    result = sweep.run(config, str(tmp_path))
    assert result["done"] == 1
    assert list(result["failed"]) == ["base_lr=1e+30"]
    lines = rows_of(tmp_path)
    assert "Not finite" in lines[0]["remark"] and not lines[0]["knn top-1 (%)"]
    assert float(lines[1]["knn top-1 (%)"]) > 0
    assert sweep.run(config, str(tmp_path))["done"] == 1  # not tried again


def test_workers_share_the_groups(digits_file, tmp_path, monkeypatch):
    config = small(digits_file, joint=1)
    trained = []
    monkeypatch.setattr(sweep, "_train", lambda group, *_: trained.extend(c.name for c in group))
    monkeypatch.setattr(sweep, "_evaluate", lambda *_: None)
    with pytest.raises(UserError, match="--teachers-only"):
        sweep.run(config, str(tmp_path), worker=1, workers=2)
    monkeypatch.setattr(pretrain, "run", lambda *_: {"step": 2})
    sweep.run(config, str(tmp_path), teachers_only=True)
    assert trained == []
    for worker in (0, 1):
        sweep.run(config, str(tmp_path), worker=worker, workers=2)
    assert sorted(trained) == sorted(cell.name for cell in cells.expand(config))
    with pytest.raises(UserError, match=r"--worker=2 must be in 0..1"):
        sweep.run(config, str(tmp_path), worker=2, workers=2)


def test_the_dry_run_tells_what_is_saved(digits_file, tmp_path, capsys):
    config = small(digits_file)
    config.axes = (("config.student.hidden", (8, 16, 32)),)
    config.recipe = RECIPES[1]
    result = sweep.run(config, str(tmp_path / "none"), dry_run=True, costs=True)
    assert [len(names) for names in result["groups"]] == [3]
    printed = capsys.readouterr().out
    assert "teacher small: 2 forward passes" in printed
    assert printed.count("5 forward passes") == 3
    share = float(printed.split("GFLOP an image, ")[-1].split()[0])
    assert 0.3 < share < 0.9
    assert not (tmp_path / "none").exists()


def test_a_dry_run_for_a_slice_tells_memory_and_speed(digits_file, tmp_path, capsys, monkeypatch):
    """Replaces the TPU compiler, which tests/plan covers, by fixed results: 1 GiB and 2 s."""
    config = small(digits_file, teacher="", teachers={})
    config.recipe = RECIPES[0]
    config.axes = (("config.student.hidden", (8,)),)
    compiled = budget.program.Program({"student": 2**30}, 2**34, cycles=1.0)
    monkeypatch.setattr(budget.topology, "open_slice", lambda name: name)
    monkeypatch.setattr(budget.program, "compile_step", lambda experiment, where: compiled)
    monkeypatch.setattr(budget.estimate, "times", lambda *_: budget.estimate.Times(2.0, 1.0, 0.0))
    sweep.run(config, str(tmp_path / "none"), dry_run=True, topology="v5e:2x4")
    assert "1.00 of 16 GiB a chip, 4 images/s on v5e:2x4" in capsys.readouterr().out
    monkeypatch.setattr(
        budget.program, "compile_step", lambda *_: budget.program.Program({"teacher": 2**35}, 2**34)
    )
    sweep.run(config, str(tmp_path / "none"), dry_run=True, topology="v5e:2x4")
    assert "32.00 of 16 GiB a chip: too large" in capsys.readouterr().out


def test_means_and_spreads_are_over_seeds(digits_file):
    config = small(digits_file, seeds=(0, 1, 2))
    config.axes = (("config.student.hidden", (8,)),)
    config.recipe = RECIPES[0]
    every = cells.expand(config)
    results = {
        cell.name: {"knn": runs.Row("knn", top1=50.0 + i)} for i, cell in enumerate(every[:2])
    }
    (row,) = table.rows(every, {c.name: 1 for c in every}, results, {every[2].name: "lost"})
    head, (line,) = table.lines([row], ["knn"])
    columns = dict(zip(head, line, strict=True))
    assert columns["seeds"] == "2/3" and columns["knn protocol"] == "knn"
    assert columns["knn top-1 (%)"] == 50.5
    assert columns["knn +-"] == pytest.approx(0.5**0.5)
    assert columns["remark"] == "lost"


def measured(config, reference):
    """Returns the results row of a cell as if it had been trained and evaluated."""
    evaluation = flags.load(reference)
    result = {"top1": 50.0, "data": "imagenet2012", **saved.settings(evaluation)}
    run = types.SimpleNamespace(config=json.loads(config.to_json_best_effort()), data={})
    (row,) = runs.results(run, evaluation.name, result)
    return row


def taught(config, by="moco_v2:student=resnet50"):
    """Returns the config with the network of its teacher, as a run stores it."""
    own = flags.load(by)
    config.teacher.update(teacher.shape(own.student))
    config.teacher.update(mean=tuple(own.augment.mean), std=tuple(own.augment.std))
    return config


def table_of(cells_of_sweep, score):
    """Returns the rows of a table whose cells are evaluated by the entry `score`."""
    results = {
        cell.name: {
            score.name: measured(cell.config, score.complete(experiment.parse(cell.config)))
        }
        for cell in cells_of_sweep
    }
    return table.rows(cells_of_sweep, {cell.name: 1 for cell in cells_of_sweep}, results, {})


def values(rows, axis, name="linear"):
    """Returns value on an axis -> printed top-1 of the same experiment, of rows that have one."""
    printed = {row.values[axis]: row.printed.get(name) for row in rows}
    return {x: v.top1 for x, v in printed.items() if v is not None and not v.differences}


LINEAR = scoring.entries(["linear"])[0]


def test_papers_values_stand_beside_the_matching_cells():
    """Checks DisCo's numbers at width 2048 and DisCo*'s where the head is as wide as features."""
    config = flags.load("sweeps/hidden_width")
    config.teachers.resnet50.weights = "moco_v2_200ep_pretrain.pth.tar"
    every = [c for c in cells.expand(config) if c.config.student.backbone == "resnet18"]
    for cell in every:
        taught(cell.config)
    rows = table_of(every, LINEAR)
    assert values(rows, "config.student.hidden") == {512: 57.1, 2048: 60.6}
    head, lines = table.lines(rows, ["linear"])
    columns = [dict(zip(head, line, strict=True)) for line in lines]
    by_width = {line["student.hidden"]: line for line in columns}
    assert by_width["2048"]["linear protocol"] == "linear_disco"
    assert by_width["4096"]["linear, paper"] is None  # figure 9, whose values are only drawn
    text = table.text(head, lines).decode()
    assert "60.6" in text and text.count("Table") == 2


def test_a_temperature_sweep_shows_one_value():
    config = flags.load("sweeps/seed:axis=temperature")
    config.teachers.resnet50.weights = "moco_v2_200ep_pretrain.pth.tar"
    every = cells.expand(config)
    for cell in every:
        taught(cell.config)
    axis = "config.objectives.similarity.teacher_temperature"
    assert values(table_of(every, LINEAR), axis) == {1e-2: 57.6}


def test_a_mixed_sweep_scores_every_cell_by_its_own_papers_probe():
    """ResNet, EfficientNet, SwAV, DINO and SSLight in one table."""
    config = common.sweep("mixed")
    config.teachers = {name: common.teacher(name) for name in ("resnet50", "vit_small_p16")}
    config.axes = (("recipe", ("disco",)), ("student", ("resnet18", "efficientnet_b0")),
                   ("teacher", ("resnet50",)))  # fmt: skip
    config.further = (
        (("recipe", ("swav", "sslight_dino")), ("student", ("mobilenetv2",))),
        (("recipe", ("dino",)), ("student", ("vit_tiny_p16",))),
    )
    every = cells.expand(config)
    probes = {cell.name: LINEAR.config(experiment.parse(cell.config)) for cell in every}
    rates = [
        (probe.name, probe.learning_rate.base_lr, probe.network, probe.blocks, probe.optimizer.name)
        for probe in probes.values()
    ]
    assert rates == [
        ("linear_disco", 30.0, "student", 1, "sgd"),
        ("linear_disco", 3.0, "student", 1, "sgd"),
        ("linear_swav", 0.3, "student", 1, "sgd"),
        ("linear_sslight", 0.05, "student", 1, "lars"),
        ("linear_dino", 0.001, "momentum", 4, "sgd"),
    ]
    assert all(probe.augment == "linear" for probe in probes.values())
    digits = flags.load("disco:student=resnet8,data=digits")
    assert LINEAR.config(experiment.parse(digits)).augment == "none"


def test_all_evaluations_may_score_a_sweep():
    references = (
        "knn", "linear", "linear:protocol=cached", "semi:percent=10", "finetune", "fewshot",
        "transfer:data=cifar100", "cost",
    )  # fmt: skip
    scores = scoring.entries(references)
    assert [score.name for score in scores] == [
        "knn", "linear", "linear:protocol=cached", "semi_disco_10", "finetune", "fewshot",
        "transfer_disco_cifar100", "cost",
    ]  # fmt: skip
    run = flags.load("moco_v2:student=mobilenetv3_large")
    assert scores[3].config(experiment.parse(run)).student == "mobilenetv3_large"
    with pytest.raises(UserError, match=r"config\.evaluate='tsne'"):
        scoring.entries(["tsne"])


@pytest.mark.parametrize("name", ["students_teachers", "testbeds:bed=dino"])
def test_a_dry_run_lists_the_evaluations_without_weights(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "assemble", lambda *_, **__: pytest.fail("assembled"))
    result = sweep.run(flags.load(f"sweeps/{name}"), str(tmp_path / "none"), dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == result["cells"] and not (tmp_path / "none").exists()
    assert all("linear:protocol=" in line and "; student " in line for line in lines)
    if "dino" in name:
        assert "linear:protocol=dino,student=vit_tiny_p16, knn" in lines[0]


def test_a_picture_may_have_sizes_along_x():
    """Draws accuracy against the teacher's size, without a teacher at 0."""
    rows = [
        table.Row({"student": "a", "teacher": t}, 2**20, {"knn": {0: top1}}, 1, {},
                  teacher_parameters=size)
        for t, top1, size in (("large", 3.0, 2**22), ("none", 1.0, 0), ("small", 2.0, 2**21))
    ]  # fmt: skip
    for x in table.SIZES:
        assert table.draw(rows, x, "knn").startswith(b"\x89PNG")
    assert {table._line_name(row, "teacher_parameters") for row in rows} == {"a"}
    assert [table._size(row, "teacher_parameters") for row in rows] == [4.0, 0.0, 2.0]


def test_shots_and_costs_have_columns_of_their_own():
    names = "fewshot, 5 images a class", "fewshot, 10 images a class"
    row = table.Row({"student": "a"}, 1, {name: {0: 5.0} for name in names}, 1, {})
    head, _ = table.lines([row], ["fewshot"])
    assert [f"{name} top-1 (%)" in head for name in names] == [True, True]
    costs = {"a": {"rows": [{"multiply_adds": 5e8, "median_ms": 7.0}]}}
    row = dataclasses.replace(row, cost=table.cost(costs["a"]))
    head, (line,) = table.lines([row], ["fewshot"])
    columns = dict(zip(head, line, strict=True))
    assert (columns["multiply-adds (M)"], columns["CPU ms"]) == (500.0, 7.0)
