"""Recipes state their papers' experiments, and `small.py` fits them to small images."""

import pathlib
import re

import pytest

import helpers
from disco_jax import flags, methods
from disco_jax.configs import common, small
from disco_jax.nested import flatten
from disco_jax.train.experiment import parse

ROOT = pathlib.Path(__file__).parent.parent
PRETRAINING = [name for name in flags.recipes() if "objectives" in flags.load(name)]
# Variants of recipes beside their defaults.
VARIANTS = [recipe for recipe in helpers.RECIPES if ":" in recipe]
VARIANTS += ["dino:student=resnet18", "sslight_dino:student=vit_tiny_p16"]

# Fields that define an experiment: of the training, and of each network that takes part.
TRAINING = (
    "batch_size", "total_epochs", "views", "augment.jitter", "learning_rate.base_lr",
    "learning_rate.decay", "optimizer.name", "optimizer.weight_decay",
)  # fmt: skip
NETWORKS = {
    "student": ("student.backbone", "student.norm"),
    "momentum": ("momentum.ema_rate", "momentum.norm"),
    "teacher": ("teacher.backbone", "teacher.norm"),
}


def unusual(value):
    """Returns a value of the same type that no paper has."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return type(value)(value + 977)
    if isinstance(value, str):
        return value + "?"
    return (*value, 977.0) if value and isinstance(value[0], float) else value


@pytest.mark.parametrize("recipe", [*PRETRAINING, *VARIANTS])
def test_a_recipe_states_what_defines_its_experiment(recipe, monkeypatch):
    """No setting of the experiment comes from the defaults: all of them are spoilt here."""
    expected = flatten(flags.load(recipe))
    method = methods.plan(parse(flags.load(recipe)).method)
    fields = [*TRAINING, *(field for network in method for field in NETWORKS[network])]
    active = {name.split(".")[1] for name, x in expected.items() if name.endswith(".weight") and x}
    fields += [
        name
        for name in expected
        if name.startswith("objectives.") and name.split(".")[1] in active
        if re.search(r"weight|temperature|queue_size|epsilon|rate$|count", name)
    ]
    pretrain = common.pretrain

    def spoilt(*args):
        config = pretrain(*args)
        values = flatten(config)
        # A weight stays: objectives that a recipe does not name must remain without one.
        changed = [field for field in fields if not field.endswith(".weight")]
        config.update_from_flattened_dict({field: unusual(values[field]) for field in changed})
        return config

    monkeypatch.setattr(common, "pretrain", spoilt)
    stated = flatten(flags.load(recipe))
    missing = [field for field in fields if stated[field] != expected[field]]
    assert not missing


def test_settings_for_small_images_name_recipes():
    names = {flags.load(recipe).name for recipe in [*PRETRAINING, *VARIANTS]}
    assert set(small.SHORT_RUNS) <= names
    assert set(small.SMALL_IMAGES) <= names
    assert set(small.TRANSFORMERS) <= names


@pytest.mark.parametrize("recipe", PRETRAINING)
def test_small_settings_do_not_reach_the_papers_runs(recipe):
    config = flags.load(recipe)
    arg = common.parse(None, data="imagenet2012", smoke=False)
    assert small.shrink(config.copy_and_resolve_references(), arg) == config


@pytest.mark.parametrize("recipe", PRETRAINING)
@pytest.mark.parametrize("data", ["imagenet2012", "digits", "fashion_mnist"])
def test_a_smoke_run_takes_two_small_steps(recipe, data):
    config = flags.load(f"{recipe}:data={data},smoke=true")
    assert (config.total_steps, config.batch_size, config.augment.size) == (2, 8, 32)
    assert config.local.count in (0, 2, 6) and config.local.size in (16, 96)
    queues = [value for name, value in flatten(config).items() if name.endswith("queue_size")]
    assert max(queues) == 64
    assert config.teacher.weights == ("random" if helpers.has_teacher(recipe) else "")


@pytest.mark.parametrize("data", small.QUEUES)
@pytest.mark.parametrize("recipe", PRETRAINING)
def test_a_run_on_small_images_is_short(recipe, data):
    config = flags.load(f"{recipe}:data={data}")
    assert (config.batch_size, config.total_epochs, config.augment.flip_prob) == (128, 40, 0.0)
    assert max(config.learning_rate.milestones, default=0) < 40
    assert config.local.size in (config.augment.size // 2, 96)


def test_milestones_keep_their_share_of_the_run():
    assert flags.load("compress").learning_rate.milestones == (90, 120)
    assert flags.load("compress:data=digits").learning_rate.milestones == (28, 37)


def test_a_distillation_on_all_views_keeps_its_share_on_fewer_views():
    """SwAV + DisCo: half the mean over views and dimensions."""
    for arg, views, dim in (("", 8, 128), ("data=digits", 4, 128), ("smoke=true", 4, 16)):
        config = flags.load(f"swav_disco:{arg}")
        distill = config.objectives.distill
        assert distill.views == tuple(range(views)) and config.student.dim == dim
        assert distill.weight == 0.5 / (views * dim)


def test_modules_that_recipes_share_are_no_recipes():
    for folder in flags.FOLDERS:
        assert not {"common", "small", "probes", "data", "networks", "training"} & {
            pathlib.PurePath(name).name for name in flags.recipes(folder)
        }


ID = r"\b(?:[MDSARWNL]|B)\d{1,2}\b"


def test_each_disagreement_has_one_row_and_each_citation_a_row():
    page = (ROOT / "docs" / "disagreements.md").read_text()
    rows = re.findall(r"^\| ([A-Z]\d+) \|", page, re.M)
    assert len(rows) == len(set(rows)) > 25
    cited = {}
    for path in [*(ROOT / "configs").rglob("*.py"), *(ROOT / "disco_jax").rglob("*.py")]:
        for text in re.findall(rf"disagreements? ((?:{ID}[, ]*)+)", path.read_text()):
            cited |= dict.fromkeys(re.findall(ID, text), path.name)
    assert len(cited) > 15
    assert not {one: where for one, where in cited.items() if one not in rows}
