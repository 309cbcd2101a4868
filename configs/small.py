"""Recipes on small images, and smoke runs of two steps.

A recipe states its paper's settings and ends with `return small.shrink(config, arg)`. Everything
that differs on small grey images (`data=digits`, `data=fashion_mnist`) or in a smoke run
(`smoke=true`) is here.
"""

from typing import Any

from ml_collections import ConfigDict

from disco_jax.configs import common
from disco_jax.configs.sweeps import common as sweeps

# Data set -> keys in a queue; 65,536 would be more than there are images.
QUEUES = {"digits": 1024, "fashion_mnist": 16_384}

# DINO on few images: gentler crops, faster EMA and AdamW. A last layer that learns levels out its
# scores before the network distinguishes views, and then all images get the same targets; here it
# keeps its random values.
_DINO = {
    "total_epochs": 200,  # the schedule of a smoke run; small images have 40
    "augment.scale": (0.5, 1.0),
    "local.count": 2,
    "local.scale": (0.3, 0.7),
    "student.dim": 128,
    "student.prototypes": (256,),
    "teacher.dim": 128,
    "momentum.ema_rate": 0.99,
    "objectives.self_distill.momentum_temperature": 0.04,
    "objectives.self_distill.warmup_epochs": 0,
    "optimizer.name": "adamw",
    "optimizer.weight_decay": 0.0,
    "optimizer.weight_decay_end": -1.0,
    "optimizer.clip": 3.0,
    "optimizer.frozen": ("prototypes/*",),
    "optimizer.frozen_until": (),
    "optimizer.frozen_epochs": 0,
    "learning_rate.base_lr": 8e-3,
    "learning_rate.warmup_epochs": 2,
}
# SwAV's prototypes and queue for few images. With epsilon=0.05 digits end with the same assignment
# for all images, because a few hundred steps do not separate them well enough.
_PROTOTYPES = {
    "student.hidden": 2048,
    "student.prototypes": (32,),
    "objectives.swapped.epsilon": 0.01,
    "objectives.swapped.queue_epochs": 1,
    "learning_rate.warmup_from": 0.0,
}
_SWAV = {
    **_PROTOTYPES,
    "augment.scale": (0.5, 1.0),
    "local.count": 2,
    "local.scale": (0.3, 0.7),
    "learning_rate.base_lr": 8.0,  # LARC moves a kernel by a thousandth of the rate; runs are short
    "learning_rate.minimum": 0.0,
    "optimizer.frozen_steps": 0,
    "optimizer.frozen_epochs": 1,
}
# Recipe (`config.name`) -> fields that change on small images and in smoke runs.
SHORT_RUNS: dict[str, dict[str, Any]] = {
    "dino": _DINO,
    "dino_disco": _DINO,
    "sslight_dino": _DINO,
    "swav": _SWAV,
    "swav_disco": _SWAV,
    "sslight_swav": _PROTOTYPES,
}

# Crops of small images keep more of the image.
_SSLIGHT = {"augment.scale": (0.4, 1.0), "local.count": 2, "local.scale": (0.3, 0.7)}
# LARS moves a kernel by a thousandth of the rate, too little for a short run.
_SGD = {
    "optimizer.name": "sgd",
    "optimizer.weight_decay": 1e-4,
    "optimizer.no_decay": (),
    "optimizer.no_trust": (),
    "learning_rate.base_lr": 0.12,
    "learning_rate.warmup_epochs": 0,
}
# MoCo-v2's head: in short runs of narrow networks the narrow initialisation of SSLight's head
# collapses to a few features.
_SSLIGHT_MOCO = {**_SSLIGHT, **_SGD, "student.head": "mlp", "momentum.ema_rate": 0.99}
# Recipe (`config.name`) -> fields that change only on small images.
SMALL_IMAGES: dict[str, dict[str, Any]] = {
    "bingo": {"objectives.bags.own_epochs": 2},
    "byol": {**_SGD, "momentum.ema_rate": 0.99},
    "simclr": _SGD,
    "online_clusters": {"objectives.online_clusters.count": 64},
    "sslight_moco": _SSLIGHT_MOCO,
    "sslight_moco_two": {**_SSLIGHT_MOCO, "local.count": 0},
    # SwAV's head and optimizer, for the same reasons.
    "sslight_swav": {
        **_SSLIGHT,
        "student.head": "swav",
        "optimizer.name": "larc",
        "optimizer.no_decay": (),
        "optimizer.no_trust": (),
        "learning_rate.base_lr": 8.0,
        "learning_rate.warmup_epochs": 2,
    },
}

# Recipes (`config.name`) whose student may be a transformer.
TRANSFORMERS = ("dino", "dino_disco", "sslight_dino", "sslight_moco", "sslight_swav")


def shrink(config: ConfigDict, arg: ConfigDict, recipe: str = "") -> ConfigDict:
    """Returns `config`, changed in place if `arg` asks for small images or a smoke run.

    Args:
      config: a complete pretraining config with its paper's settings.
      arg: the recipe's arguments; `data`, `smoke` and the presence of `teacher` count.
      recipe: key of the tables in this file; "": `config.name`.
    """
    recipe = recipe or config.name
    small = arg.data in QUEUES
    if not small and not arg.smoke:
        return config
    config.update_from_flattened_dict(SHORT_RUNS.get(recipe, {}))
    # A batch may be smaller than the papers' groups.
    config.objectives.relations.group = config.student.norm_group = 0
    if small:
        _small_images(config, QUEUES[arg.data])
    if arg.smoke:
        _smoke(config)
        if "teacher" in arg:
            config.teacher.weights = "random"
    if small:
        config.update_from_flattened_dict(SMALL_IMAGES.get(recipe, {}))
    _local_views(config)
    if recipe in TRANSFORMERS:
        _patches(config)
    _own_backbones(config)
    _swapped(config)
    return config


def _small_images(config: ConfigDict, queue_size: int) -> None:
    """Sets batch, queue, schedule and augmentation for grey images of 16 to 28 px."""
    config.batch_size = 128
    _set_queues(config, queue_size)
    rate = config.learning_rate
    rate.milestones = tuple(round(40 * x / config.total_epochs) for x in rate.milestones)
    config.total_epochs = 40
    if rate.minimum > 1e-6:  # chosen for the papers' large batches
        rate.minimum = 0.0
    if config.augment.jitter_prob and not config.local.count:
        config.augment.antialias = "exact"  # costs nothing at this size
    config.augment.flip_prob = 0.0  # digits and shoes have a handedness
    config.log.every_steps = 20
    config.checkpoint.every_steps = 200


def _smoke(config: ConfigDict) -> None:
    """Limits a run to two steps with small numbers, for any data set."""
    config.batch_size = 8
    config.total_steps = 2
    config.augment.size = 32
    for network in (config.student, config.teacher):
        # 0 and -1 take their width from elsewhere.
        network.hidden = 32 if network.hidden > 0 else network.hidden
        network.dim = 16 if network.dim > 0 else network.dim
        network.predictor = 32 if network.predictor > 0 else 0
    if config.student.prototypes and not config.objectives.pseudo_labels.weight:
        config.student.prototypes = (16,)
    if config.local.count and not config.objectives.similarity.weight:  # not SEED's six patches
        config.local.count = 2
    config.objectives.online_clusters.count = 16
    _set_queues(config, 64)
    config.log.every_steps = 1
    config.checkpoint.every_steps = 1


def _set_queues(config: ConfigDict, size: int) -> None:
    """Sets the length of every objective's queue."""
    for fields in config.objectives.values():
        if "queue_size" in fields:
            fields.queue_size = size


def _local_views(config: ConfigDict) -> None:
    """Makes local views half as large as global ones and softens the blur."""
    if not config.local.count:
        return
    config.local.size = config.augment.size // 2
    if config.objectives.similarity.weight:  # SEED's patches
        config.local.scale = (0.1, 0.3)
    else:
        config.augment.blur_sigma = (0.1, 0.6)


def _patches(config: ConfigDict) -> None:
    """Gives transformers patches of 4 px."""
    from disco_jax import models  # imports JAX

    for network in (config.student, config.teacher):
        if common.is_transformer(network.backbone):
            has_grid = "grid" in models.options(network.backbone)
            grid = config.augment.size // 4 if has_grid else 0
            network.update(patch=4, stem="", grid=grid)


def _own_backbones(config: ConfigDict) -> None:
    """Sets no small stem for backbones outside this package that have none."""
    for network in (config.student, config.teacher):
        if ":" in network.backbone:
            from disco_jax import models  # imports JAX

            if "stem" not in models.options(network.backbone):
                network.stem = ""


def _swapped(config: ConfigDict) -> None:
    """Fits SwAV's queue to the batch, and a distillation on all views to their number."""
    if not config.objectives.swapped.weight:
        return
    config.objectives.swapped.queue_size = 2 * config.batch_size
    if config.objectives.distill.weight:
        common.distill_elements(config)


def sweep(config: ConfigDict) -> None:
    """Limits each cell of a sweep to two steps on tiny images, with random teachers."""
    if config.recipe:
        config.recipe = recipe(config.recipe)
    config.changes = (
        ("augment.size", 16),
        ("local.size", 8),
        ("student.width", 4),
        ("teacher.width", 4),
    )
    config.teachers = {name: sweeps.teacher("resnet8", "random") for name in config.teachers}
    config.evaluate = (("linear:protocol=cached", (("total_epochs", 2),)), "knn")


def recipe(reference: str) -> str:
    """Returns a recipe's reference with the arguments of a smoke run on digits."""
    return f"{reference}{',' if ':' in reference else ':'}data=digits,smoke=true"
