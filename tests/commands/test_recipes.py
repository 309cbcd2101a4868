"""Tests that all pretraining recipes are consistent for all data sets, without compiling them."""

import itertools

import numpy as np
import pytest

import helpers
from disco_jax import errors, fields, flags, methods
from disco_jax.commands import plan
from disco_jax.configs import data as datasets
from disco_jax.data.bags import Bags
from disco_jax.train import experiment as experiments
from disco_jax.train import teacher
from disco_jax.workflows import pretrain

IMAGES = {"imagenet2012": 1_281_167, "fashion_mnist": 60_000, "digits": 1437}
CIFAR = {"cifar10": 50_000, "cifar100": 50_000}
# Recipes with arguments other than `data`, so that every branch of a recipe is built.
VARIANTS = [
    *helpers.RECIPES,
    "attention:disco=true",
    "rkd:disco=true",
    "disco:student=efficientnet_b0,teacher=resnet50w2",
    "seed:student=mobilenetv3_large,teacher=resnet152w2",
    "swav:student=resnet50w2,script=rn50w2",
    "supervised:student=mobilenetv2",
    "bingo:student=efficientnet_b1",
    "swav_disco:student=mobilenetv3_large",
    "dino:student=mobilenetv2",
    "dino_disco:student=xcit_tiny_12_p16,teacher=xcit_small_12_p16",
    "sslight_dino:student=vit_tiny_p16",
]


class Images:
    """A source that knows only its number of images."""

    name, num_classes, unreadable = "images", 10, ()

    def __init__(self, count):
        self.splits, self._count = ["train"], count

    def count(self, split):
        return self._count

    def take(self, split, rows):
        return iter(())


def loaded(recipe, data, *further):
    name, _, arg = recipe.partition(":")
    return flags.load(f"{name}:" + ",".join(filter(None, [arg, f"data={data}", *further])))


def test_every_data_set_is_among_those_of_these_tests():
    assert set(datasets.DATA) == {*IMAGES, *CIFAR}


@pytest.mark.parametrize(
    "recipe, data",
    [*itertools.product(VARIANTS, IMAGES), *itertools.product(("seed", "supervised"), CIFAR)],
)
def test_networks_objectives_and_optimizer_are_built(recipe, data):
    """Checks queue sizes, unused views and schedules."""
    config = loaded(recipe, data)
    config.bags.file = config.bags.file or "bags.npz"
    problems = errors.Problems()
    fields.check(config, problems)
    problems.raise_any()
    steps_per_epoch = (IMAGES | CIFAR)[data] // config.batch_size
    assert steps_per_epoch >= 1
    experiment = experiments.assemble(config, steps_per_epoch=steps_per_epoch)
    experiments.check_views(experiment)
    experiment.build_step()
    assert methods.memory_bytes(experiment.method, experiment.settings.method) < 2**31


@pytest.mark.parametrize("recipe", helpers.PRETRAINING)
def test_a_run_on_fashion_mnist_is_prepared(recipe, monkeypatch):
    """Runs all checks before compilation: shapes of all views, patterns, bags."""
    arg = "student=resnet8" + (",teacher=resnet8" if helpers.has_teacher(recipe) else "")
    config = loaded(recipe, "fashion_mnist", arg)
    clusters = np.arange(IMAGES["fashion_mnist"], dtype=np.int32) % sum(
        config.student.prototypes or (100,)
    )
    monkeypatch.setattr(Bags, "load", lambda path: Bags(clusters=clusters))
    monkeypatch.setattr(teacher, "load", lambda *_: None)
    config.teacher.weights = "random"
    if config.objectives.bags.weight or config.objectives.pseudo_labels.weight:
        config.bags.file = "bags.npz"
    ready = pretrain.prepare(config, Images(IMAGES["fashion_mnist"]))
    experiment = ready.experiment
    assert experiment.total_steps == config.total_epochs * experiment.steps_per_epoch > 0
    assert set(experiment.record.encoded) == set(experiment.needs)


def test_a_plan_tells_the_forward_passes():
    """Checks RETRO's six and DisCo's five passes: two views of student and teacher, the keys."""
    counts = {"retro": "6", "disco": "5", "seed": "2", "moco_v2": "2"}
    for recipe, count in counts.items():
        passes = plan.describe_passes(methods.plan(experiments.parse(flags.load(recipe)).method))
        assert passes.startswith(f"{count} forward passes")
