"""An evaluation's protocol follows from the run: its paper, its backbone, its data."""

import logging
import types

import pytest

import helpers
from disco_jax import flags, models
from disco_jax.configs import probes, seed
from disco_jax.configs.sslight_dino import VIEWS
from disco_jax.errors import UserError
from disco_jax.evaluate import protocols
from disco_jax.evaluate.features import TrainedModel
from disco_jax.train.experiment import parse


@pytest.fixture
def run(tmp_path):
    """A function that writes the config of a run and returns its directory."""

    def written(recipe, **changes):
        config = flags.load(recipe)
        config.update_from_flattened_dict(changes)
        (tmp_path / "config.json").write_text(config.to_json_best_effort())
        return str(tmp_path)

    return written


def parsed(run, task="linear", *words):
    """Returns the config of `disco-jax TASK --workdir RUN WORDS`."""
    words = [*words, f"--workdir={run}"]
    return flags.parse(
        task, words, default_config=f"configs/{task}.py", help_line="", choose=protocols.choose
    ).config


@pytest.mark.parametrize(
    "recipe, protocol, expected",
    [
        ("disco:student=efficientnet_b0", "disco", dict(rate=3.0, batch_size=256)),
        ("disco:student=tf_efficientnet_b1", "disco", dict(rate=3.0)),
        ("retro:student=resnet34", "disco", dict(rate=30.0)),
        ("seed:student=mobilenetv3_large_seed", "seed", dict(rate=3.0, warmup_from=3.0)),
        ("swav_disco:student=mobilenetv3_large", "swav", dict(rate=0.3, decay="cosine")),
        ("dino:student=vit_tiny_p16", "dino", dict(network="momentum", blocks=4, rate=0.001)),
        ("dino:student=xcit_tiny_12_p16", "dino", dict(network="momentum", blocks=1)),
        ("sslight_moco", "sslight", dict(optimizer="lars", batch_size=4096, network="student")),
        ("sslight_dino:student=vit_tiny_p16", "sslight", dict(optimizer="sgd", blocks=4)),
        ("simreg", "compress", dict(total_epochs=40, rate=0.01)),
    ],
)
def test_the_default_on_imagenet_is_the_probe_of_the_runs_paper(run, recipe, protocol, expected):
    config = parsed(run(recipe))
    values = {
        "rate": config.learning_rate.base_lr, "decay": config.learning_rate.decay,
        "warmup_from": config.learning_rate.warmup_from, "optimizer": config.optimizer.name,
        **{name: config[name] for name in ("batch_size", "blocks", "network", "total_epochs")},
    }  # fmt: skip
    assert {name: values[name] for name in expected} == expected
    assert config.protocol == f"linear:{protocol}" and config.name == f"linear_{protocol}"
    assert config.student == flags.load(recipe).student.backbone and config.augment == "linear"
    settings = parse(flags.load(recipe))
    self_distills = bool(settings.objectives["self_distill"]["weight"])
    reference = probes.protocol_for(settings.name, settings.student.backbone, self_distills)
    assert flags.load(reference).to_dict() == config.to_dict()


def test_an_imported_network_has_no_ema_copy(run):
    folder = run("moco_v2", **{"name": "dino", "student.backbone": "vit_tiny_p16"})
    config = parsed(folder)
    assert (config.protocol, config.network, config.blocks) == ("linear:dino", "student", 4)


def test_runs_on_other_images_have_a_cached_probe_with_the_rate_of_their_family(run):
    config = parsed(run("disco:data=digits,student=mobilenetv2"))
    assert (config.protocol, config.name, config.augment) == ("linear:cached", "linear", "none")
    assert (config.student, config.learning_rate.base_lr) == ("mobilenetv2", 3.0)


def test_explicit_settings_come_first(run):
    folder = run("swav:student=efficientnet_b1")
    config = parsed(folder, "linear", "--config=linear:protocol=seed")
    assert (config.protocol, config.student) == ("linear:seed", "efficientnet_b1")
    assert config.learning_rate.base_lr == config.learning_rate.warmup_from == 3.0
    config = parsed(folder, "linear", "--config.learning_rate.base_lr=0.7")
    assert (config.protocol, config.learning_rate.base_lr) == ("linear:swav", 0.7)
    assert parsed(folder, "linear", "--config=linear:student=resnet18").student == "resnet18"
    semi = parsed(folder, "semi", "--config=semi:protocol=retro")
    assert semi.learning_rate.base_lr == 3.0
    kd = parsed(folder, "finetune", "--config=finetune:protocol=kd")
    assert kd.learning_rate.base_lr == 3.0


def test_recipes_of_users_and_missing_runs_are_left_alone(run, tmp_path):
    own = tmp_path / "own.py"
    own.write_text("from disco_jax.configs import linear\n\nget_config = linear.get_config\n")
    assert protocols.choose(str(own), run("swav")) == str(own)
    assert protocols.choose("configs/linear.py", "no/run") == "configs/linear.py"
    assert protocols.choose("transfer:data=cifar10", run("swav")) == "transfer:data=cifar10"


def trained(recipe):
    """Returns a network of a run without weights."""
    config = flags.load(recipe)
    encoder = types.SimpleNamespace(backbone=models.backbone(config.student.backbone).backbone)
    return TrainedModel(encoder, {}, parse(config), 0)


def test_a_config_without_a_student_takes_the_rate_of_the_runs_family():
    for recipe, rate in (("disco:student=tf_efficientnet_b0", 3.0), ("disco", 30.0)):
        for probe in ("linear", "linear:protocol=disco", "finetune:protocol=kd"):
            config = flags.load(probe)
            assert config.learning_rate.base_lr == 0.0
            assert protocols.fit(config, trained(recipe)).learning_rate.base_lr == rate
    semi = protocols.fit(flags.load("semi:protocol=seed"), trained("seed:student=mobilenetv2"))
    assert semi.learning_rate.warmup_from == semi.learning_rate.base_lr == 3.0


def test_settings_for_convolutional_networks_are_refused_for_transformers():
    vit = trained("sslight_dino:student=vit_tiny_p16")
    for protocol in ("dino", "sslight"):
        with pytest.raises(UserError, match=rf"protocol={protocol},student=vit_tiny_p16"):
            protocols.fit(flags.load(f"linear:protocol={protocol}"), vit)
        protocols.fit(flags.load(f"linear:protocol={protocol},student=vit_tiny_p16"), vit)
        protocols.fit(flags.load(f"linear:protocol={protocol}"), trained("sslight_dino"))
    protocols.fit(flags.load("linear:protocol=dino"), trained("dino:student=xcit_tiny_12_p16"))
    protocols.fit(flags.load("semi:protocol=sslight"), vit)
    with pytest.raises(UserError, match="student=resnet18"):
        protocols.fit(flags.load("linear:student=resnet50"), trained("disco"))


@pytest.mark.parametrize(
    "probe, recipe, warns",
    [
        ("linear:protocol=disco", "swav", True),
        ("linear:protocol=swav", "swav_disco", False),
        ("linear:protocol=disco", "moco_v2", False),
        ("linear:protocol=cached", "swav", False),
        ("linear:protocol=disco_code", "disco", False),
        ("semi:protocol=swav", "disco", False),
        ("transfer:protocol=disco", "swav", False),
    ],
)
def test_the_protocol_of_another_paper_is_warned_about(probe, recipe, warns, caplog):
    with caplog.at_level(logging.WARNING):
        protocols.fit(flags.load(probe), trained(recipe))
    assert [record.message for record in caplog.records if "linear:protocol" in record.message] == (
        [
            "The protocol disco is not that of the paper of swav, which is "
            "--config=linear:protocol=swav,student=resnet50."
        ]
        if warns
        else []
    )


def test_the_table_of_testbeds_names_recipes_and_knows_those_with_own_probes():
    variants = [f"sslight_{m}:views={v}" for m in ("dino", "moco", "swav") for v in VIEWS]
    variants += [f"seed:views={name}" for name in seed.GROUPS]
    variants += ["sslight_moco:views=two", "seed:moco=true"]
    recipes = [flags.load(name) for name in (*helpers.RECIPES, *variants)]
    families = {"sslight", "compress"}  # of imports
    assert set(probes.TESTBEDS) - families <= {config.name for config in recipes}
    for config in recipes:
        if config.objectives.self_distill.weight or config.objectives.swapped.weight:
            assert probes.testbed(config.name) in ("swav", "dino", "sslight"), config.name
