"""Cells of the papers' tables: each resolves, is built and has a two-step form."""

import collections
import json
import pathlib

import chex
import jax
import pytest

import helpers
from disco_jax import flags, methods
from disco_jax.errors import UserError
from disco_jax.evaluate import protocols
from disco_jax.ops.collectives import AXIS
from disco_jax.report import catalogue, rows
from disco_jax.train import experiment

ROOT = pathlib.Path(__file__).parents[2]
CELLS = rows.rows()
RUNNING = [row for row in CELLS.values() if row.state == rows.RUNS]
IMAGES = rows.IMAGES["imagenet2012"]


def tiny(config):
    """Returns the config with tiny networks that keep the head and everything else."""
    config.teacher.head = "mlp" if config.teacher.head == "auto" else config.teacher.head
    backbone = "resnet8" if config.objectives.attention.weight else "tiny"  # attention reads maps
    for network in (config.student, config.teacher):
        network.update(backbone=backbone, width=0, grid=0, patch=0, drop_path=0.0)
    config.bags.file = "bags.npz"
    return config


def plan(config):
    return methods.plan(experiment.parse(config).method)


def program(config):
    """Returns a key that is equal for configs whose steps have the same structure."""
    active = sorted(name for name, section in config.objectives.items() if section.weight)
    student = config.student
    parts = (
        plan(config),
        active,
        student.head,
        student.layers,
        student.reuse,
    )
    how = config.group_views, config.optimizer.name, config.momentum.follow
    return json.dumps([*parts, *how], sort_keys=True)


def smoke(recipe):
    return flags.load(flags.with_arguments(recipe, "smoke=true"))


def new_programs():
    """Returns id -> cell with a program that no test of a recipe compiles."""
    recipes = (*helpers.RECIPES, "attention:disco=true", "rkd:disco=true", "dino:student=resnet18")
    tested = {program(smoke(recipe)) for recipe in recipes}
    tested.add(program(smoke("sslight_dino:student=vit_tiny_p16")))
    by_program = {program(row.config(smoke=True)): row for row in reversed(RUNNING)}
    return {row.id: row for key, row in by_program.items() if key not in tested}


def test_ids_are_unique_and_lie_in_their_tables():
    ids = [row.id for entry in rows.tables().values() for row in entry.rows]
    assert len(ids) == len(set(ids)) == len(CELLS) > 500
    for row in CELLS.values():
        assert row.table in rows.tables()
        assert row.source and (row.recipe or row.missing or row.command), row.id
        assert row.state != rows.RUNS or row.evaluation is not None, row.id
        assert row.teacher is None or not row.teacher.row or row.teacher.row in CELLS, row.id


def test_printed_values_are_percentages_or_numbers_of_parameters():
    for row in CELLS.values():
        assert set(row.printed) <= {"top1", "top5", "AP", "AP50", "AP75", "parameters"}, row.id
        assert all(5 < value < 100 for value in row.printed.values()), row.id
        assert row.printed.get("top1", 0) < row.printed.get("top5", 100), row.id
    assert dict(CELLS["disco/table1/resnet18/resnet50"].printed) == {"top1": 60.6, "top5": 83.7}
    assert dict(CELLS["retro/table4/resnet34/head"].printed) == {"top1": 63.4}


@pytest.mark.parametrize("name", rows.tables())
def test_every_cell_of_a_table_resolves(name):
    """Loads recipe, changes, teacher, evaluation and two-step form, and compiles nothing."""
    trained = {(row.recipe, row.changes): row for row in rows.tables()[name].rows if row.recipe}
    for row in trained.values():
        config = row.config()
        assert config.student.backbone == row.arguments["student"]
        assert ("teacher" in plan(config)) == (row.teacher is not None), row.id
        assert row.config(smoke=True).total_steps == 2
        if row.teacher is not None:
            own = row.teacher.config()
            assert own.student.backbone == row.teacher.backbone == config.teacher.backbone, row.id
    scored = {row.evaluation: row for row in rows.tables()[name].rows if row.evaluation}
    for evaluation, row in scored.items():
        assert evaluation.config().get("student", "") in ("", row.arguments["student"]), row.id


def test_the_steps_of_all_cells_are_built():
    """Checks queues, views, schedules and optimizers at the papers' sizes, with tiny networks."""
    built = collections.Counter()
    with helpers.tiny_backbone():
        for row in RUNNING:
            config = tiny(row.config())
            key = config.to_json_best_effort()
            built[key] += 1
            if built[key] == 1:
                steps = IMAGES // config.batch_size
                assembled = experiment.assemble(config, steps_per_epoch=steps)
                experiment.check_views(assembled)
                assembled.build_step()
    assert 40 < len(built) < len(RUNNING)


def test_programs_of_no_other_test_take_steps():
    """Traces a step of each, which the tests of the recipes do not compile."""
    programs = new_programs()
    assert 0 < len(programs) < 8
    for name, row in programs.items():
        config = helpers.only_cropped(tiny(row.config(smoke=True)))
        config.augment.size, config.local.size = 16, 8
        with helpers.tiny_backbone():
            step, state, frozen, batch = helpers.smoke(config, replicas=2)
            step = jax.vmap(step, in_axes=(None, None, 0), out_axes=None, axis_name=AXIS)
            after, metrics = jax.eval_shape(step, state, frozen, batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, jax.eval_shape(lambda s=state: s))
        assert metrics["loss"].shape == (), name


def test_cells_that_run_are_probed_by_the_protocol_of_their_paper():
    """Compares each cell's probe with the one that a sweep chooses by recipe and network.

    Baselines of other papers are probed by the paper that quotes them.
    """
    others = collections.Counter()
    for row in RUNNING:
        if row.evaluation.task == "linear":
            chosen = protocols.complete("linear", experiment.parse(row.config()))
            if chosen != row.evaluation.reference:
                others[row.table] += 1
                assert row.arguments and row.recipe.partition(":")[0] in QUOTED, row.id
    assert not [name for name in others if name.startswith("disco/")]


# Recipes of one paper in the table of another.
QUOTED = {"moco_v2", "dino", "swav", "seed", "disco"}


def test_cells_are_found_by_prefix_and_near_ones_are_named():
    assert rows.find("disco/table1/resnet18/resnet50").arguments["student"] == "resnet18"
    assert len(rows.below("disco/table1/resnet18")) == 6
    assert len(rows.below("disco")) > 100
    with pytest.raises(UserError, match=r"Nearest: disco/table1/resnet18/resnet50, "):
        rows.find("disco/table1/resnet81/resnet50")
    with pytest.raises(UserError, match="has 6 cells"):
        rows.find("disco/table1/resnet18")


def test_the_page_is_what_the_cells_say():
    stored = (ROOT / "docs" / "reproduce.md").read_text()
    assert stored == catalogue.markdown(), "disco-jax reproduce --markdown > docs/reproduce.md"
