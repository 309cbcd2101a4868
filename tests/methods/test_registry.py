"""Tests the registry of objectives: generated config sections, and classes of a user's own."""

import json
import textwrap

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

import helpers
from disco_jax import flags, methods
from disco_jax.configs import common
from disco_jax.errors import UserError
from disco_jax.methods import base, registry
from disco_jax.methods.bags import Bags
from disco_jax.methods.compress import Compress
from disco_jax.methods.contrast import Contrast
from disco_jax.methods.similarity import Similarity
from disco_jax.ops.memory import Queue, QueueSettings
from disco_jax.ops.queues import QueueAccess
from disco_jax.run import workdir
from disco_jax.train.experiment import parse

# The sections as config.json of earlier runs has them: a run continues only if they are equal.
RECORDED = {
    "contrast": {
        "weight": 0.0,
        "pairs": ((0, 1),),
        "keys_from": "momentum",
        "temperature": 0.2,
        "queue_size": 65536,
        "queue_init": "teacher",
        "local_queries": False,
        "global_share": -1.0,
    },
    "distill": {
        "weight": 0.0,
        "views": (0, 1),
        "reduction": "mean",
        "teacher_output": "embedding",
        "teacher_views": (),
        "teacher_unit": True,
    },
    "similarity": {
        "weight": 0.0,
        "groups": (((0, 0),),),
        "student_temperature": 0.2,
        "teacher_temperature": 0.01,
        "queue_size": 65536,
        "queue_init": "random",
    },
    "relations": {"weight": 0.0, "view": 0, "distance": 1.0, "angle": 1.0, "group": 0},
    "attention": {"weight": 0.0, "view": 0, "layers": "all", "resize": "none"},
    "compress": {
        "weight": 0.0,
        "view": 0,
        "bank": "momentum",
        "teacher_output": "features",
        "temperature": 0.04,
        "queue_size": 128000,
    },
    "bags": {
        "weight": 0.0,
        "temperature": 0.2,
        "queue_size": 65536,
        "queue_init": "random",
        "cutmix": True,
        "cutmix_group": 32,
        "own_epochs": 11,
    },
    "consistency": {
        "weight": 0.0,
        "query_view": 0,
        "key_view": 1,
        "student_temperature": 0.1,
        "target_temperature": 0.04,
        "queue_size": 131072,
    },
    "pseudo_labels": {"weight": 0.0, "view": 0},
    "online_clusters": {
        "weight": 0.0,
        "view": 0,
        "count": 4096,
        "temperature": 0.2,
        "rate": 0.9,
        "idle": 0.01,
    },
    "binary_contrast": {"weight": 0.0, "view": 0, "temperature": 0.07, "queue_size": 65536},
    "swapped": {
        "weight": 0.0,
        "assign": (0, 1),
        "temperature": 0.1,
        "epsilon": 0.05,
        "iterations": 3,
        "queue_size": 0,
        "queue_epochs": 0,
        "global_share": -1.0,
    },
    "self_distill": {
        "weight": 0.0,
        "targets": (0, 1),
        "student_temperature": 0.1,
        "momentum_temperature": 0.04,
        "warmup_temperature": 0.04,
        "warmup_epochs": 0,
        "centre_rate": 0.9,
        "global_share": -1.0,
    },
}
OBJECTIVE = """
import dataclasses

import jax.numpy as jnp

from disco_jax.errors import UserError
from disco_jax.methods.base import Objective, Term


@dataclasses.dataclass(frozen=True)
class Decorrelated(Objective):
    weight: float = 1.0
    view: int = 0
    scale: float = 2.0

    def needs(self, views):
        return {"student": (self.view,)}

    def check_settings(self, setting, batch_size):
        super().check_settings(setting, batch_size)
        if self.scale > batch_size:
            raise UserError(f"{setting}.scale={self.scale} is above {batch_size}.")

    def __call__(self, record, memory, step):
        rows = record.embedding("student", self.view)
        return Term(self.scale * jnp.mean(jnp.square(rows)), memory)


@dataclasses.dataclass(frozen=True)
class WithoutDefault(Objective):
    weight: float


class NoDataclass(Objective):
    pass


class Other:
    pass
"""
RECIPE = """
from disco_jax.configs import common, small
from disco_jax.methods import registry


def get_config(arg=None):
    arg = common.parse(arg, student="resnet8", teacher="resnet8", data="digits", smoke=True)
    config = common.pretrain("mine", arg.data)
    config.objectives.mine = registry.section("own_objectives:Decorrelated", weight=0.5)
    return small.shrink(config, arg)
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module outside the package, with objectives."""
    (tmp_path / "own_objectives.py").write_text(OBJECTIVE)
    (tmp_path / "broken_objectives.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_objectives"


@pytest.fixture
def own_recipe(tmp_path, own_module):
    """A recipe outside the package, with an objective outside the package."""
    file = tmp_path / "own_recipe.py"
    file.write_text(RECIPE)
    return str(file)


@pytest.mark.parametrize("name", RECORDED)
def test_generated_sections_equal_the_recorded_ones(name):
    generated = registry.sections()[name]
    assert generated == RECORDED[name] and list(generated) == list(RECORDED[name])
    types = {field: type(value) for field, value in RECORDED[name].items()}
    assert {field: type(value) for field, value in generated.items()} == types


def test_the_stored_config_equals_the_recorded_one():
    """Compares JSON, which a run stores and compares with that of the next start."""
    stored = json.loads(common.pretrain().to_json_best_effort())["objectives"]
    expected = json.loads(ConfigDict(RECORDED).to_json_best_effort())
    assert {name: stored[name] for name in RECORDED} == expected
    assert list(stored) == list(registry.objectives())


def test_a_run_that_began_before_an_objective_existed_continues():
    """Unless it now has a weight."""
    old, new = common.pretrain(), common.pretrain()
    del old.objectives["cross_correlation"]
    assert workdir.differences(old, new) == []
    new.objectives.cross_correlation.weight = 1.0
    (difference,) = workdir.differences(old, new)
    assert difference == "config.objectives.cross_correlation.weight: 0.0 -> 1.0"


def test_fields_that_the_run_sets_are_not_part_of_the_config():
    assert "steps_per_epoch" not in base.config_fields(Bags)
    with pytest.raises(UserError, match=r"bags=?.*steps_per_epoch"):
        registry.build("bags", {"weight": 1.0, "steps_per_epoch": 3})


def test_an_objective_of_weight_zero_is_not_imported():
    assert registry.build("mine", {"weight": 0.0, "cls": "no_such_module:Class"}) is None


def test_a_recipe_of_a_users_own_may_name_an_objective_outside_the_package(own_recipe):
    words = [f"--config={own_recipe}", "--config.objectives.mine.scale=3.0"]
    config = flags.parse(
        "pretrain", words, help_line="", needs_workdir=False, like=flags.PRETRAINING
    ).config
    assert config.objectives.mine.to_dict() == {
        "cls": "own_objectives:Decorrelated", "weight": 0.5, "view": 0, "scale": 3.0,
    }  # fmt: skip
    stored = ConfigDict(json.loads(config.to_json_best_effort()))
    objective = helpers.build_method(stored, config.views).objectives["mine"]
    assert type(objective).__module__ == "own_objectives"
    assert (objective.weight, objective.scale) == (0.5, 3.0)


def test_an_objective_outside_the_package_trains(own_module):
    """A run stores the section, and the step computes the loss and its gradient."""
    with helpers.tiny_backbone():
        config = helpers.tiny_config("moco_v2", **{"objectives.contrast.weight": 0.0})
        config.objectives.mine = registry.section(f"{own_module}:Decorrelated")
        step, state, frozen, batch = helpers.smoke(config, replicas=1)
        new, metrics = helpers.single(step, state, frozen, jax.tree.map(lambda x: x[0], batch))
    assert float(metrics["loss"]) > 0 and float(metrics["gradient_norm"]) > 0
    assert new.memory == {"mine": ()}


def test_an_objective_outside_the_package_checks_its_own_settings(own_module):
    config = common.pretrain()
    config.objectives.mine = registry.section(f"{own_module}:Decorrelated", scale=1e6)
    with pytest.raises(UserError, match=r"config\.objectives\.mine\.scale=1000000\.0 is above"):
        methods.check(parse(config).method)


@pytest.mark.parametrize(
    "path, message",
    [
        ("no_such_module:Class", r"objectives\.mine\.cls='no_such_module:Class'.*No module named"),
        ("broken_objectives:Class", r"cannot be imported \(ZeroDivisionError"),
        ("own_objectives:Decorelated", "Did you mean 'Decorrelated'"),
        ("own_objectives:Other", "must be a frozen dataclass that derives from"),
        ("own_objectives:NoDataclass", "must be a frozen dataclass that derives from"),
        ("own_objectives:WithoutDefault", "a default for every field: weight"),
        ("own_objectives", "must have the form 'module:Class'"),
    ],
)
def test_a_class_that_is_no_objective_is_refused(own_module, path, message):
    with pytest.raises(UserError, match=message):
        registry.build("mine", {"weight": 1.0, "cls": path})
    with pytest.raises(UserError):
        registry.section(path)


def test_unknown_fields_and_names_are_refused_with_the_nearest(own_module):
    with pytest.raises(UserError, match="Did you mean 'scale'"):
        registry.section(f"{own_module}:Decorrelated", scala=1.0)
    with pytest.raises(UserError, match=r"Did you mean 'contrast'.*cls='module:Class'"):
        registry.build("contrasts", {"weight": 1.0})
    with pytest.raises(UserError, match=r"Set config\.objectives\.mine\.weight"):
        registry.build("mine", {"cls": f"{own_module}:Decorrelated"})


@pytest.mark.parametrize(
    "objective, half, shared",
    [(Contrast, True, 8), (Bags, True, 8), (Similarity, False, 8), (Compress, False, 0)],
)
def test_queues_have_the_settings_that_their_objective_supports(objective, half, shared):
    settings = QueueSettings(half=True, shared=8, access=QueueAccess(one_pass=False))
    method = base.Method({}, {"one": objective(queue_size=16)}, base.Views((0, 1)), (), settings)
    rows = jax.ShapeDtypeStruct((1, 4), jnp.float32)
    encoded = {
        network: dict.fromkeys(range(4), base.Encoded(rows, rows)) for network in base.NETWORKS
    }
    memory = method.memory(jax.random.key(0), base.Record(encoded, {}))
    queues = jax.tree.leaves(memory, is_leaf=lambda leaf: isinstance(leaf, Queue))
    assert queues
    for queue in queues:
        assert queue.vectors.dtype == (jnp.bfloat16 if half else jnp.float32)
        assert (queue.shared, queue.access) == (shared, settings.access)


def test_every_objective_documents_its_fields():
    """The page of settings shows these descriptions."""
    for cls in registry.objectives().values():
        attributes = textwrap.dedent(cls.__doc__).partition("Attributes:")[2]
        for field in base.config_fields(cls):
            assert f"      {field}: " in attributes, (cls, field)
