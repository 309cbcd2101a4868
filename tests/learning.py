"""Trains one network on the digits and prints its kNN score: what `test_learning` runs.

A process of its own, because tests have four virtual devices and unoptimised programs; both cost
more time here than they save.

    python tests/learning.py FOLDER teacher
    python tests/learning.py FOLDER seed [shuffled]
"""

import functools
import os
import sys

import jax
import jax.numpy as jnp

import helpers
from disco_jax import flags
from disco_jax.configs import demo
from disco_jax.data.arrays import ArraySource
from disco_jax.evaluate import features
from disco_jax.tasks import bags, knn, pretrain
from disco_jax.train import step as step_module

EPOCHS = {"simreg": 40, "ressl": 40, "compress:queues=1": 40}  # else 10
RATES = {"pseudo_labels:clusters=64": 16, "compress": 16}  # times what the recipe has; else 4
WITHOUT_TEACHER = ("ressl", "pseudo_labels:clusters=64")


def recipe(name, folder):
    """A recipe for a few epochs of digits: larger rates and gentler crops than it ships with."""
    path, _, arg = name.partition(":")
    config = flags.load(f"{path}:data=digits" + (f",{arg}" if arg else ""))
    rate = RATES.get(name, 4) * config.learning_rate.per_256
    demo._digits(config)
    config.learning_rate.update(per_256=rate, decay="cosine", warmup_epochs=0)
    config.student.update(backbone="resnet14", width=4)
    if config.student.hidden > 512:
        config.student.hidden = 512
    config.teacher.update(backbone="resnet8", width=16)
    if name not in WITHOUT_TEACHER:
        config.teacher.weights = f"{folder}/teacher"
    if config.objectives.bags.weight:
        config.bags.file = f"{folder}/knn/bags.npz"
    if config.objectives.pseudo_labels.weight:
        config.bags.file = f"{folder}/kmeans/bags.npz"
    config.total_epochs = EPOCHS.get(name, 10)
    return config


def make_teacher(folder, source):
    """The teacher of the quick start, and the bags that it makes."""
    found = train(demo.get_config().teacher, f"{folder}/teacher", source)
    for kind in ("knn", "kmeans"):
        config = flags.load("bags:data=digits")
        config.update(teacher=f"{folder}/teacher", kind=kind, clusters=64)
        bags.run(config, f"{folder}/{kind}", source)
    return found


def train(config, run, source):
    """Trains a network; its kNN top-1 on the held-out digits, in percent."""
    config.log.update(tensorboard=False, every_steps=22)
    config.checkpoint.every_steps = 10_000
    pretrain.run(config, run, source)
    return knn.evaluate(flags.load("knn"), features.load(run), source)["top1"]


def shuffle_teacher():
    """From now on, teachers say of an image what they would of another one of the batch."""
    real = step_module._teacher
    roll = functools.partial(jnp.roll, shift=1, axis=0)
    step_module._teacher = lambda *args: jax.tree.map(roll, real(*args))


def main(folder, name, shuffled=""):
    source = ArraySource(helpers.digits_splits())
    if name == "teacher":
        return make_teacher(folder, source)
    config = recipe(name, folder)
    if shuffled:
        shuffle_teacher()
    run = f"{folder}/{name.replace(':', '_')}{shuffled}"
    return train(config, os.path.abspath(run), source)


if __name__ == "__main__":
    print(f"score {main(*sys.argv[1:]):.2f}")
