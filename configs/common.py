"""Arguments of pretraining recipes, and every field with its default."""

from typing import Any

from ml_collections import ConfigDict

from disco_jax.configs import data, networks, training
from disco_jax.data import presets
from disco_jax.errors import UserError, unknown


def parse(arg: str | None, **defaults: str | int | float | bool) -> ConfigDict:
    """Parses the part after the colon of `--config FILE:key=value,key=value`.

    Args:
      arg: the part after the colon, or None.
      defaults: argument -> default; its type is the type of the argument.

    Raises:
      UserError: for a key that the recipe does not have or a value of another type.
    """
    values: dict[str, Any] = dict(defaults)
    for pair in filter(None, (arg or "").split(",")):
        key, _, text = pair.partition("=")
        if key not in defaults:
            raise unknown("The recipe's argument", key, defaults)
        values[key] = _convert(pair, text, type(defaults[key]))
    return ConfigDict(values)


def _convert(pair: str, text: str, kind: type) -> Any:
    """Returns the value of `pair` ("key=text") as a `kind`; a bare key means true."""
    if kind is bool:
        if text.lower() not in ("", "true", "false"):
            key = pair.partition("=")[0]
            raise UserError(f"The recipe's argument {pair!r} must be {key}=true or false.")
        return text.lower() != "false"
    try:
        return kind(text)
    except ValueError:
        message = f"The recipe's argument {pair!r} must be of type {kind.__name__}."
        raise UserError(message) from None


def pretrain(name: str = "", dataset: str = "imagenet2012") -> ConfigDict:
    """Returns every field of a pretraining config; each objective has weight 0.

    Args:
      name: the recipe.
      dataset: a name of `data.DATA` or any other TFDS name.
    """
    from disco_jax.methods import registry  # imports JAX

    config = ConfigDict()
    config.name = name  # the recipe, as tables and figures show it
    config.seed = 0
    config.batch_size = 256  # images a step over all devices of all hosts
    config.total_epochs = 200
    config.total_steps = 0  # length of the run in steps; 0: total_epochs decides
    config.dtype = "auto"  # compute dtype: float32 | bfloat16 | auto (float32 on CPUs only)
    config.data = data.source(dataset)
    _views(config, dataset)
    _networks(config, dataset)
    config.objectives = registry.sections()
    _training(config)
    return config


def _views(config: ConfigDict, dataset: str) -> None:
    """Sets the fields for the views of an image: MoCo-v2's two."""
    size = data.properties(dataset)["size"]
    config.views = 2  # global crops of an image; objectives number them from 0
    config.augment = {**presets.PRESETS["moco_v2"], "size": size}
    # Additional smaller crops, numbered after the global ones. Fields that `local` does not have
    # are those of `augment`.
    config.local = dict(presets.NO_LOCALS)
    # true: views of one size go through a network in one pass and share batch statistics (SwAV,
    # DINO, SSLight); false: one pass a view (MoCo, DisCo, SEED).
    config.group_views = False
    # Groups of similar images from `disco-jax bags`. sampling: images | clusters (each cluster
    # equally often).
    config.bags = dict(file="", sampling="images")


def _networks(config: ConfigDict, dataset: str) -> None:
    """Sets the sections of the three networks."""
    stem = data.properties(dataset)["stem"]
    # dim=0: as wide as the teacher output it is compared with.
    config.student = networks.student(stem)
    config.momentum = networks.momentum()
    config.teacher = networks.teacher(stem)


def _training(config: ConfigDict) -> None:
    """Sets the sections for speed, optimizer, logs and checkpoints."""
    # Speed: these options change what is learned only by rounding.
    config.fast = training.fast()
    config.optimizer = training.optimizer()
    config.learning_rate = training.learning_rate()
    # Detects collapse: health/std below min_std in `patience` consecutive log lines. min_std=0
    # disables it; stop=true ends the run.
    config.health = dict(min_std=0.01, patience=10, stop=False)
    config.log = training.log()
    # kNN accuracy during training, logged as knn/top1: classifies each image of a labelled split by
    # the student's features of the others. Each time costs a forward pass over `images`.
    config.monitor = training.monitor()
    config.checkpoint = training.checkpoint()


def augment(config: ConfigDict, preset: str) -> None:
    """Sets `config.augment` to one of `presets.PRESETS` and keeps the image size."""
    config.augment = {**presets.PRESETS[preset], "size": config.augment.size}


def distill_elements(config: ConfigDict) -> None:
    """Sets the distillation to half its mean over all views and dimensions (disagreement W1).

    `Distill` sums over views and dimensions, so that the weight divides by their numbers.
    """
    views = config.views + config.local.count
    weight = 0.5 / (views * config.student.dim)
    config.objectives.distill.update(weight=weight, views=tuple(range(views)))


def readable_blocks(backbone: str) -> int:
    """Returns the number of last blocks of a backbone that probes may read; 1 without a name."""
    if not backbone:
        return 1
    from disco_jax import models  # imports JAX

    return models.backbone(backbone).backbone.readable_blocks


def family(backbone: str) -> str:
    """Returns the family of a backbone, such as "resnet" or "efficientnet"; "" for unknown names.

    Papers choose some settings by it.
    """
    from disco_jax import models  # imports JAX

    return models.family(backbone)


def features(network: ConfigDict) -> int:
    """Returns the number of features of the backbone of `config.student` or `config.teacher`."""
    from disco_jax import models  # imports JAX

    return models.width(network)


def is_transformer(backbone: str) -> bool:
    """Returns whether a backbone is a transformer, which DINO trains with AdamW."""
    from disco_jax import models  # imports JAX

    return models.is_transformer(backbone)
