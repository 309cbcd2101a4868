"""Script run by `test_learning`: trains networks on the digits and prints their kNN scores.

It runs in a separate process with one device, since the four virtual devices of the tests make
these runs slower.

    python tests/learning.py FOLDER teacher
    python tests/learning.py FOLDER seed [seed/shuffled | seed/weightless | seed/untrained]

It prints two scores per run: the accuracy on the held-out digits, which the test checks, and the
leave-one-out accuracy on the training digits, from which the thresholds were chosen.
"""

import contextlib
import functools
import os
import sys

import jax
import jax.numpy as jnp

import helpers
from disco_jax import flags
from disco_jax.commands import bags
from disco_jax.configs import demo
from disco_jax.data.arrays import ArraySource
from disco_jax.evaluate import features, probe
from disco_jax.evaluate.knn import leave_one_out
from disco_jax.methods import swapped
from disco_jax.train import learner, step
from disco_jax.train.experiment import parse
from disco_jax.workflows import pretrain

EPOCHS = {
    "simreg": 40,
    "ressl": 40,
    "sslight_moco": 60,
    "swav_disco": 25,
    "sslight_swav": 25,
    "dino": 40,
    "byol": 40,
}  # default: 10, or 20 for multi-crop recipes
RATES = {  # factor on the learning rate; default 4
    "pseudo_labels:clusters=64": 16,
    "compress": 16,
    "simclr": 1,
    "supervised": 1,
}
WITHOUT_TEACHER = ("ressl", "pseudo_labels:clusters=64", "simclr", "byol", "supervised")
# Recipes with crops of two sizes, which keep their own views and rates.
MULTICROP = ("swav_disco", "sslight_moco", "sslight_swav")


def recipe(name, folder):
    """Returns a recipe for a few epochs of digits, with larger rates and gentler crops."""
    if name in MULTICROP:
        return multicrop(name, folder)
    if name == "dino":
        return dino()
    path, _, arg = name.partition(":")
    config = flags.load(f"{path}:data=digits" + (f",{arg}" if arg else ""))
    rate = RATES.get(name, 4) * config.learning_rate.base_lr
    demo._digits(config)
    config.learning_rate.update(base_lr=rate, decay="cosine", warmup_epochs=0)
    config.student.update(backbone="resnet14", width=4)
    if config.student.hidden > 512:
        config.student.hidden = 512
    if config.student.predictor:
        config.student.predictor = 256
    config.teacher.update(backbone="resnet8", width=16)
    if name not in WITHOUT_TEACHER:
        config.teacher.weights = f"{folder}/teacher"
    if config.objectives.bags.weight:
        config.bags.file = f"{folder}/knn/bags.npz"
    if config.objectives.pseudo_labels.weight:
        config.bags.file = f"{folder}/kmeans/bags.npz"
    config.total_epochs = EPOCHS.get(name, 10)
    return config


def dino():
    """Returns DINO with gentle crops and without its local views."""
    config = flags.load("dino:data=digits,student=resnet14")
    config.student.update(width=4, hidden=256, dim=64)
    config.total_epochs = EPOCHS["dino"]
    config.local.count = 0
    config.augment.update(scale=(0.4, 1.0), blur_sigma=(0.1, 0.6))
    return config


def multicrop(name, folder):
    """Returns a shortened recipe with views of two sizes, gentle crops and few local views."""
    with_teacher = name.endswith("disco")
    student = "student=resnet14,teacher=resnet8" if with_teacher else "student=resnet14"
    config = flags.load(f"{name}:data=digits,{student}")
    config.student.update(width=4, hidden=256, dim=64)
    config.total_epochs = EPOCHS.get(name, 20)
    config.augment.scale = (0.4, 1.0)
    config.local.update(count=1, size=12, scale=(0.3, 0.7))
    if name == "sslight_moco":  # a narrow network recognises its key by the batch statistics
        config.student.norm, config.momentum.norm = "local", "shuffle"
        config.student.update(hidden=128, dim=128)
    if "swav" in name:  # does not learn without wide local views and mostly global pairs
        config.student.update(backbone="resnet8", width=8, hidden=64, dim=16)
        config.augment.scale = config.local.scale = (0.5, 1.0)
        config.objectives.swapped.global_share = 0.8
        config.learning_rate.warmup_epochs = 0
    if with_teacher:
        config.teacher.update(width=16, weights=f"{folder}/teacher", network="student")
        config.student.dim = 128
        config.objectives.distill.views = tuple(range(config.views + config.local.count))
    return config


def make_teacher(folder, source):
    """Trains the teacher of the quick start, computes its bags, and returns its scores."""
    scores = train(demo.get_config().teacher, f"{folder}/teacher", source)
    for kind in ("knn", "kmeans"):
        config = flags.load("bags:data=digits")
        config.update(teacher=f"{folder}/teacher", kind=kind, clusters=64)
        bags.run(config, f"{folder}/{kind}", source)
    return scores


def train(config, run, source):
    """Trains a network and returns its `scores_of`."""
    config.log.update(tensorboard=False, report=False, every_steps=22)
    config.checkpoint.every_steps = 10_000
    pretrain.run(config, run, source)
    return scores_of(features.load(run), source)


@contextlib.contextmanager
def shuffled_targets():
    """Assigns each image the targets of the next image in the batch, inside the context.

    Rolls the outputs of teachers and momentum networks, and SwAV's assignments, by one image.
    """
    real, assign = learner.targets_of, swapped.sinkhorn
    roll = functools.partial(jnp.roll, shift=1, axis=0)

    def shuffled(*args):
        targets, stats = real(*args)
        return jax.tree.map(roll, targets), stats

    learner.targets_of = step.targets_of = shuffled
    swapped.sinkhorn = lambda *args, **options: roll(assign(*args, **options))
    yield
    learner.targets_of = step.targets_of = real
    swapped.sinkhorn = assign


def take_weights(config):
    """Scales all objectives down until float32 parameters do not change; trains one epoch.

    Only the statistics change, for which crops alone suffice; the rest takes long to compile.
    """
    for fields in config.objectives.values():
        fields.weight *= 1e-30
    config.total_epochs = 1
    helpers.only_cropped(config)


def scores_of(trained, source):
    """Returns kNN top-1 in percent: (on held-out digits, leave-one-out on training digits)."""
    splits = [
        features.of_split(trained, source, split, 256, ("features",)) for split in ("train", "test")
    ]
    config = flags.load("knn")
    voting = {name: config[name] for name in probe.KNN_FIELDS}
    left_out_top1 = leave_one_out(splits[0].features, splits[0].labels, 20)
    return probe.knn_probe(*splits, **voting)["top1"], left_out_top1


def main(folder, name, variant, source):
    if name == "teacher":
        return make_teacher(folder, source)
    config = recipe(name, folder)
    if variant == "untrained":
        return scores_of(features.untrained(parse(config)), source)
    if variant == "weightless":
        take_weights(config)
    run = f"{folder}/{name.replace(':', '_')}{variant}"
    with shuffled_targets() if variant == "shuffled" else contextlib.nullcontext():
        return train(config, os.path.abspath(run), source)


def print_scores():
    """Trains the runs that the arguments name and prints their scores."""
    folder, *runs = sys.argv[1:]
    source = ArraySource(helpers.digits_splits())
    for word in runs:
        held_out, left_out_top1 = main(folder, *word.partition("/")[::2], source)
        print(f"score {word} {held_out:.2f} choice {left_out_top1:.2f}", flush=True)


if __name__ == "__main__":
    print_scores()
