"""Configs and command lines with the field names of earlier versions."""

import dataclasses
import json
import logging
import pathlib
import zipfile

import pytest
from ml_collections import ConfigDict

import helpers
from disco_jax import errors, flags
from disco_jax.configs import common
from disco_jax.nested import flatten
from disco_jax.run import upgrades, workdir
from disco_jax.train import stored_settings

OLD = pathlib.Path(__file__).parents[1] / "upgrades" / "run_0.1.0.zip"
# Fields of an earlier config -> the fields of this version.
FIELDS = {
    "learning_rate.per_256": "learning_rate.base_lr",
    "optimizer.frozen": "optimizer.frozen_until",
    "optimizer.fixed": "optimizer.frozen",
    "plane.points": "information_plane.points",
    "evaluation.learning_rate.per_256": "evaluation.learning_rate.base_lr",
}


def test_renamed_fields_lead_to_fields_of_this_version():
    fields = flatten(common.pretrain()).keys() | flatten(flags.load("plane")).keys()
    for name in upgrades.RENAMED.values():
        assert any(field == name or field.startswith(f"{name}.") for field in fields), name


def test_fields_of_an_earlier_config_are_renamed():
    assert upgrades.renamed([*FIELDS, "optimizer.frozen_steps", "seed"]) == FIELDS


def test_a_field_that_changed_its_meaning_is_renamed_only_in_earlier_configs():
    current = flatten(common.pretrain()) | flatten(flags.load("plane"))
    assert upgrades.renamed(current) == {}
    assert upgrades.renamed(["optimizer.frozen", "optimizer.frozen_until"]) == {}


def test_an_earlier_config_keeps_its_values_under_the_new_names(caplog):
    config = ConfigDict()
    config.learning_rate = dict(per_256=0.25, decay="cosine")
    config.optimizer = dict(frozen=("prototypes/*",), frozen_steps=5, fixed=("head/*",))
    config.plane = dict(points=7)
    config.lock()
    with caplog.at_level(logging.INFO):
        flat = flatten(upgrades.complete(config))
    assert flat == {
        "learning_rate.base_lr": 0.25,
        "learning_rate.decay": "cosine",
        "optimizer.frozen": ("head/*",),
        "optimizer.frozen_steps": 5,
        "optimizer.frozen_until": ("prototypes/*",),
        "information_plane.points": 7,
    }
    assert "plane" not in config and config.is_locked
    assert "config.learning_rate.per_256 is now config.learning_rate.base_lr" in caplog.text
    caplog.clear()
    assert flatten(upgrades.complete(config)) == flat and not caplog.text


def test_a_run_of_the_first_version_has_todays_fields(tmp_path, caplog):
    with zipfile.ZipFile(OLD) as archive:
        archive.extract("config.json", tmp_path)
    old = json.loads((tmp_path / "config.json").read_text())
    config = workdir.read_config(str(tmp_path))
    assert config.learning_rate.base_lr == old["learning_rate"]["per_256"]
    assert "per_256" not in config.learning_rate and "fixed" not in config.optimizer
    with caplog.at_level(logging.INFO):
        assert not [
            line
            for line in workdir.differences(ConfigDict(old), config)
            if "learning_rate" in line or "optimizer" in line
        ]
    assert "config.optimizer.fixed is now config.optimizer.frozen" in caplog.text
    settings = stored_settings.read(tmp_path)
    assert settings.learning_rate.base_lr == config.learning_rate.base_lr
    assert settings.student.start == "backbone" and settings.student.layers == 0


@pytest.mark.parametrize("recipe", ["linear:protocol=moco", "linear:protocol=sslight", "finetune"])
def test_a_training_with_labels_of_an_earlier_version_can_resume(recipe):
    """Its config.json has only the fields of the optimizer that the recipe sets."""
    config = flags.load(recipe)
    settings = dataclasses.asdict(helpers.probe_settings(config))
    old, new = (workdir.record({"evaluation": x}) for x in (config.to_dict(), settings))
    assert workdir.differences(old, new) == []
    settings["optimizer"]["trust"] = 0.5
    assert workdir.differences(old, workdir.record({"evaluation": settings}))


def parse(*words):
    task = "plane" if "plane" in words[0] else "pretrain"
    recipe = "plane" if task == "plane" else "dino"
    words = (f"--config={recipe}", "--workdir=runs/a", *words)
    return flags.parse(task, words, help_line="", like=recipe).config


def test_earlier_names_work_on_the_command_line(caplog):
    assert parse("--config.learning_rate.per_256=0.125").learning_rate.base_lr == 0.125
    assert "config.learning_rate.per_256 is now config.learning_rate.base_lr" in caplog.text
    optimizer = parse("--config.optimizer.fixed=('head/*',)").optimizer
    assert optimizer.frozen == ("head/*",) and optimizer.frozen_until == ("prototypes/*",)
    assert parse("--config.plane.points=5").information_plane.points == 5
    assert parse("--config.optimizer.frozen=('head/*',)").optimizer.frozen == ("head/*",)


def test_a_wrong_value_is_reported_with_the_new_name():
    with pytest.raises(errors.UserError, match=r"config\.learning_rate\.base_lr='fast' must be"):
        parse("--config.learning_rate.per_256=fast")


RECIPE = """
from disco_jax.configs import moco_v2

def get_config(arg=None):
    config = moco_v2.get_config("data=digits")
    {line}
    return config
"""


def load(folder, line):
    """Loads a recipe of a user's own with one more line."""
    path = folder / "recipe.py"
    path.write_text(RECIPE.format(line=line))
    return flags.load(str(path))


def test_a_recipe_may_set_earlier_names(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        config = load(tmp_path, "config.learning_rate.per_256 = 0.25")
    assert config.learning_rate.base_lr == 0.25 and "per_256" not in config.learning_rate
    assert "config.learning_rate.per_256 is now config.learning_rate.base_lr" in caplog.text
    config = load(tmp_path, "config.optimizer.fixed = ('head/*',)")
    assert config.optimizer.frozen == ("head/*",) and config.optimizer.frozen_until == ()


def test_a_recipe_that_sets_a_field_that_nothing_reads_is_refused(tmp_path):
    with pytest.raises(errors.UserError, match=r"sets config\.learning_rate\.base_lt, .*base_lr"):
        load(tmp_path, "config.learning_rate.base_lt = 0.25")


def test_changes_of_a_sweep_may_have_earlier_names(caplog):
    config = flags.changed(flags.load("moco_v2"), [("learning_rate.per_256", 0.5)], "here")
    assert config.learning_rate.base_lr == 0.5 and "is now" in caplog.text


def test_a_field_that_an_objective_got_keeps_runs_that_use_it_and_strands_no_other():
    """A run with bags drew one CutMix box for the whole batch; in others the field does nothing."""
    name = "objectives.bags.cutmix_group"
    current = flatten(common.pretrain())
    old = {field: value for field, value in current.items() if field != name}
    assert upgrades.completed(old, current)[name] == current[name] == 32
    used = old | {"objectives.bags.weight": 1.0}
    assert upgrades.completed(used, current)[name] == 0
