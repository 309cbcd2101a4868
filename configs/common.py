"""Arguments of pretraining recipes, and every field with its default."""

from typing import Any

from ml_collections import ConfigDict

from disco_jax import typed
from disco_jax.configs import data
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

    `disco_jax/train/run_settings.py` declares the fields, and `docs/settings.md` lists them.

    Args:
      name: the recipe.
      dataset: a name of `data.DATA` or any other TFDS name.
    """
    from disco_jax.methods import registry  # imports JAX
    from disco_jax.train.run_settings import RunSettings

    properties = data.properties(dataset)
    config = ConfigDict(
        typed.section(
            RunSettings,
            name=name,
            augment={**presets.PRESETS["moco_v2"], "size": properties["size"]},
            local=dict(presets.NO_LOCALS),
            objectives=registry.sections(),
        )
    )
    config.data.update(
        name=dataset,
        eval_split=properties["eval_split"],
        eval_resize=properties["eval_resize"],
    )
    config.student.stem = config.teacher.stem = properties["stem"]
    return config


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


def readable_blocks(backbone: str) -> int:
    """Returns the number of last blocks of a backbone that probes may read; 1 without a name."""
    if not backbone:
        return 1
    from disco_jax import models  # imports JAX

    return models.backbone(backbone).backbone.readable_blocks


def is_transformer(backbone: str) -> bool:
    """Returns whether a backbone is a transformer, which DINO trains with AdamW."""
    from disco_jax import models  # imports JAX

    return models.is_transformer(backbone)
