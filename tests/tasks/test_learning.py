"""Every method teaches a small student something in a minute, and broken ones do not.

kNN on the 360 held-out digits, in percent. The student with its initial weights scores 59, the
teacher about 96. The floors lie a few points below what was measured on two CPUs; what a student
learns from a teacher that speaks of the wrong images lies below them.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

import helpers
from disco_jax import flags
from disco_jax.configs import demo
from disco_jax.data.arrays import ArraySource
from disco_jax.evaluate import features
from disco_jax.tasks import bags, knn, pretrain
from disco_jax.train import step as step_module

FLOORS = {
    "seed": 80,
    "disco": 80,
    "retro": 80,
    "rkd": 70,
    "attention": 70,
    "disco_seed:rkd=true": 80,
    "squared_distance": 80,
    "binary_contrast": 75,
    "online_clusters": 75,
    "pseudo_labels:clusters=64": 75,
    "simreg": 80,
    "compress": 75,
    "compress:queues=1": 75,
    "bingo": 75,
    "ressl": 65,
}
FAST = ("seed",)
# Shuffled among the images of a batch, these teachers leave nothing else to learn from.
BROKEN = ("seed", "squared_distance", "simreg", "compress")


@pytest.fixture(scope="module")
def source():
    return ArraySource(helpers.digits_splits())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, source):
    config = demo.get_config().teacher
    config.update(total_epochs=12)
    return train(config, tmp_path_factory.mktemp("teacher") / "run", source)


@pytest.fixture(scope="module")
def made_bags(tmp_path_factory, teacher, source):
    """Kind -> file."""
    files = {}
    for kind in ("knn", "kmeans"):
        config = flags.load("bags:data=digits")
        config.update(teacher=teacher, kind=kind, clusters=64)
        files[kind] = bags.run(config, str(tmp_path_factory.mktemp(kind)), source)["file"]
    return files


def train(config, run, source):
    config.log.update(tensorboard=False, every_steps=22)
    config.checkpoint.every_steps = 10_000
    pretrain.run(config, str(run), source)
    return str(run)


def recipe(name):
    """A recipe for 10 epochs of digits: larger rates and gentler crops than it ships with."""
    path, _, arg = name.partition(":")
    config = flags.load(f"{path}:data=digits" + (f",{arg}" if arg else ""))
    rate = 4 * config.learning_rate.per_256
    demo._digits(config)
    config.learning_rate.update(per_256=rate, decay="cosine", warmup_epochs=0)
    config.student.update(backbone="resnet14", width=4)
    config.teacher.update(backbone="resnet8", width=16)
    config.total_epochs = 10
    return config


def score(trained, source):
    return knn.evaluate(flags.load("knn"), trained, source)["top1"]


@functools.cache
def untrained(source):
    return score(features.untrained(recipe("seed")), source)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in FLOORS],
)
def test_a_student_learns(name, source, teacher, request, tmp_path):
    config = recipe(name)
    if "teacher=" not in name and name not in ("ressl", "pseudo_labels:clusters=64"):
        config.teacher.weights = teacher
    if config.objectives.bags.weight or config.objectives.pseudo_labels.weight:
        made = request.getfixturevalue("made_bags")
        config.bags.file = made["knn" if config.objectives.bags.weight else "kmeans"]
    found = score(features.load(train(config, tmp_path / "run", source)), source)
    print(f"{name}: {found:.1f}, untrained {untrained(source):.1f}")
    assert found > FLOORS[name] and found > untrained(source) + 5


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in BROKEN],
)
def test_it_does_not_learn_from_a_teacher_that_speaks_of_other_images(
    name, source, teacher, tmp_path, monkeypatch
):
    real = step_module._targets

    def shuffled(*args):
        targets, stats = real(*args)
        roll = functools.partial(jnp.roll, shift=1, axis=0)
        return {**targets, "teacher": jax.tree.map(roll, targets["teacher"])}, stats

    monkeypatch.setattr(step_module, "_targets", shuffled)
    config = recipe(name)
    config.teacher.weights = teacher
    found = score(features.load(train(config, tmp_path / "run", source)), source)
    print(f"{name}, shuffled: {found:.1f}")
    assert found < FLOORS[name]
