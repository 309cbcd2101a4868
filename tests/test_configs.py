"""Recipes state their papers' experiments, and `small.py` fits them to small images."""

import pathlib
import re

import pytest

import helpers
from disco_jax import flags, methods
from disco_jax.configs import common, small
from disco_jax.errors import UserError
from disco_jax.nested import flatten
from disco_jax.train import optimizer
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


# Row of a paper's table -> recipe and fields in which it differs from the recipe's default.
ROWS = {
    "SEED, Table 1, last row": (
        "seed:teacher=resnet50w2,teacher_method=swav,views=small_patch,epochs=800",
        {
            "name": "seed_small_patch",
            "total_epochs": 800,
            "teacher.backbone": "resnet50w2",
            "augment.scale": (0.14, 1.0),
            "local.count": 6,
            "group_views": True,
            "objectives.similarity.groups": (((0, 0),), tuple((v, v) for v in range(1, 7))),
        },
    ),
    "SEED, Table 3, SwAV": ("seed:teacher_method=swav", {"augment.scale": (0.14, 1.0)}),
    "SEED, Table 3, SimCLR": (
        "seed:teacher_method=simclr",
        {
            "augment.order": ("grey", "jitter", "flip"),
            "augment.jitter": (0.4, 0.4, 0.4, 0.4),
            "augment.jitter_prob": 1.0,
            "augment.blur_prob": 0.0,
        },
    ),
    "SEED, Table 4, SEED + MoCo-v2": (
        "seed:moco=true",
        {
            "name": "seed_moco",
            "views": 2,
            "objectives.contrast.weight": 1.0,
            "objectives.contrast.queue_init": "random",
        },
    ),
    "SEED, Table 5, CIFAR-100": (
        "seed:data=cifar100",
        {
            "data.name": "cifar100",
            "data.eval_split": "test",
            "data.eval_resize": 0,
            "augment.size": 32,
            "student.stem": "small",
            "teacher.stem": "small",
        },
    ),
    "SEED, Table 6": (
        "moco_v2:student=mobilenetv3_large,weight_decay=1e-5,hidden=0",
        {
            "student.backbone": "mobilenetv3_large",
            "student.hidden": 0,
            "optimizer.weight_decay": 1e-5,
        },
    ),
    "SEED, Tables 13 and 14": (
        "seed:rate=0.1,weight_decay=1e-6",
        {
            "learning_rate.base_lr": 0.1,
            "learning_rate.warmup_from": 0.1,
            "optimizer.weight_decay": 1e-6,
        },
    ),
    "SEED, appendix A.1.2": (
        "seed:student=efficientnet_b0_seed",
        {"student.backbone": "efficientnet_b0_seed", "optimizer.weight_decay": 1e-5},
    ),
    "BINGO, EfficientNet": (
        "bingo:student=efficientnet_b1",
        {
            "student.backbone": "efficientnet_b1",
            "objectives.bags.temperature": 0.12,
            "optimizer.weight_decay": 4e-5,
        },
    ),
    "DisCo, ResNet-152": (
        "moco_v2:student=resnet152,epochs=400",
        {"student.backbone": "resnet152", "total_epochs": 400},
    ),
    "DisCo, ResNet-50x2": (
        "swav:student=resnet50w2,script=rn50w2,epochs=400",
        {
            "student.backbone": "resnet50w2",
            "student.hidden": 8192,
            "student.norm_group": 256,
            "local.count": 4,
            "total_epochs": 400,
            "batch_size": 4096,
            "learning_rate.minimum": 0.0048,
            "learning_rate.warmup_epochs": 10,
            "learning_rate.warmup_from": 0.3,
            "objectives.swapped.queue_size": 0,
            "objectives.swapped.queue_epochs": 0,
            "optimizer.frozen_steps": 313,
        },
    ),
    "DisCo, section 4.2": (
        "disco:student=efficientnet_b1,teacher=resnet50w2,epochs=290",
        {
            "student.backbone": "efficientnet_b1",
            "teacher.backbone": "resnet50w2",
            "total_epochs": 290,
        },
    ),
    "SwAV, batches of 256": (
        "swav:script=batch256",
        {
            "batch_size": 256,
            "learning_rate.base_lr": 0.6,
            "objectives.swapped.queue_size": 3840,
        },
    ),
    "SSLight, Table 1, two views": (
        "sslight_moco:views=two",
        {
            "name": "sslight_moco_two",
            "augment.scale": (0.14, 1.0),
            "local.count": 0,
            "local.size": 96,
            "local.scale": (0.05, 0.14),
            "objectives.contrast.global_share": -1.0,
            "objectives.contrast.local_queries": False,
        },
    ),
    "SSLight, Table 2, crop scales": (
        "sslight_dino:views=crop_scale",
        {
            "name": "sslight_dino_crop_scale",
            "local.size": 96,
            "objectives.self_distill.global_share": -1.0,
        },
    ),
    "SSLight, Table 2, pixel scales": (
        "sslight_dino:views=pixel_scale",
        {
            "name": "sslight_dino_pixel_scale",
            "objectives.self_distill.global_share": -1.0,
        },
    ),
    "SSLight, Table 3, SwAV": (
        "sslight_swav:views=baseline",
        {
            "name": "sslight_swav_baseline",
            "augment.scale": (0.14, 1.0),
            "local.size": 96,
            "local.scale": (0.05, 0.14),
            "objectives.swapped.global_share": -1.0,
        },
    ),
    "SSLight, Table 4, ResNet-50": (
        "sslight_dino:student=resnet50",
        {"student.backbone": "resnet50", "batch_size": 640},
    ),
    "SSLight, Table 7": ("sslight_dino:epochs=400", {"total_epochs": 400}),
    "supervised MobileNetV2": (
        "supervised:student=mobilenetv2",
        {
            "student.backbone": "mobilenetv2",
            "total_epochs": 300,
            "learning_rate.base_lr": 0.045,
            "learning_rate.milestones": tuple(range(1, 300)),
            "learning_rate.factor": 0.98,
            "optimizer.weight_decay": 4e-5,
        },
    ),
    "BYOL, 1000 epochs": (
        "byol:epochs=1000",
        {
            "total_epochs": 1000,
            "learning_rate.base_lr": 0.2,
            "optimizer.weight_decay": 1.5e-6,
            "momentum.ema_rate": 0.996,
        },
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_a_table_differs_from_the_recipe_in_its_papers_settings_only(row):
    recipe, expected = ROWS[row]
    default, config = (flatten(flags.load(x)) for x in (recipe.partition(":")[0], recipe))
    assert {name: x for name, x in config.items() if default[name] != x} == expected


def test_baselines_of_sslights_transformers_have_dinos_crops():
    config = flags.load("sslight_dino:student=vit_tiny_p16,views=baseline")
    assert (config.augment.scale, config.local.scale) == ((0.25, 1.0), (0.05, 0.25))
    assert (config.local.size, config.local.count, config.batch_size) == (96, 10, 1024)


def test_dinos_convolutional_baseline_is_sslights():
    for student in ("mobilenetv2", "resnet50"):
        pair = f"dino:student={student}", f"sslight_dino:student={student},views=baseline"
        one, other = (flatten(flags.load(recipe)) for recipe in pair)
        assert {name for name in one if one[name] != other[name]} == {"name"}


def test_ressls_cosine_starts_after_the_warm_up():
    config = flags.load("ressl")
    rate = optimizer.learning_rate(parse(config).learning_rate, config.batch_size, 100, 200)
    assert rate(0) == 0 and rate(500) == pytest.approx(0.05)
    middle = 500 + (20_000 - 500) // 2
    assert rate(middle) == pytest.approx(0.025) and rate(20_000) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "recipe, message",
    [
        ("seed:views=large", "views"),
        ("seed:teacher_method=swaw", "swav"),
        ("seed:moco=true,views=cross", "views=identical"),
        ("swav:script=rn50", "script"),
        ("sslight_dino:views=two", "views"),
        ("byol:epochs=200", "epochs"),
    ],
)
def test_unknown_rows_are_refused(recipe, message):
    with pytest.raises(UserError, match=message):
        flags.load(recipe)


def test_only_seeds_queue_may_be_shorter_than_the_batch():
    config = flags.load("seed")
    for size, fits in ((128, True), (200, True), (384, False)):
        config.objectives.similarity.queue_size = size
        if fits:
            methods.check(parse(config).method)
        else:
            with pytest.raises(UserError, match="multiple of the global batch"):
                methods.check(parse(config).method)
    config = flags.load("moco_v2")
    config.objectives.contrast.queue_size = 128
    with pytest.raises(UserError, match="multiple of the global batch"):
        methods.check(parse(config).method)


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
