"""Properties of the data sets of pretraining configs."""

from typing import Any


def _small(size: int, classes: int) -> dict[str, Any]:
    """Returns the entry of a data set of small images."""
    return dict(eval_split="test", size=size, eval_resize=0, stem="small", classes=classes)


# What differs between data sets: the split that evaluations read, the image size in px, the shorter
# side in px before evaluations crop the centre (0: resize straight to `size`), the stem of
# convolutional networks, and the number of classes.
DATA: dict[str, dict[str, Any]] = {
    "imagenet2012": dict(
        eval_split="validation", size=224, eval_resize=256, stem="imagenet", classes=1000
    ),
    "cifar10": _small(32, 10),
    "cifar100": _small(32, 100),
    "fashion_mnist": _small(28, 10),
    "digits": _small(16, 10),
}
# TFDS names of parts of a data set of `DATA`: the files of SimCLR's lists ("/1pct", "/10pct").
PARTS = {"imagenet2012_subset": "imagenet2012"}


def family(dataset: str) -> str:
    """Returns the data set whose properties another one has, e.g. "imagenet2012" for its parts.

    Args:
      dataset: TFDS name, with or without a config after the slash.
    """
    name = dataset.partition("/")[0]
    return PARTS.get(name, name)


def is_part(dataset: str) -> bool:
    """Returns whether a data set holds only the images of a list, as those in `PARTS` do."""
    return dataset.partition("/")[0] in PARTS


def is_imagenet(dataset: str) -> bool:
    """Returns whether a data set is ImageNet or a part of it, e.g. "imagenet2012_subset/1pct"."""
    return family(dataset) == "imagenet2012"


def properties(dataset: str) -> dict[str, Any]:
    """Returns the entry of `DATA`; data sets without one are treated like ImageNet."""
    return DATA.get(family(dataset), DATA["imagenet2012"])
