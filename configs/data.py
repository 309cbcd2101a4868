"""Data sets of pretraining configs."""

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


def source(dataset: str) -> dict[str, Any]:
    """Returns the section `config.data`.

    Args:
      dataset: a name of `DATA` or any other TFDS name.
    """
    return dict(
        source="tfds",  # tfds | folder | npz
        name=dataset,  # TFDS name of the data set; for other sources, its name in tables
        # "": $TFDS_DATA_DIR or ~/tensorflow_datasets. Otherwise a folder of images or .tar
        # archives, a glob pattern of image files, a list of files, or an .npz file.
        dir="",
        train_split="train",
        eval_split=properties(dataset)["eval_split"],
        # shorter side in px before evaluations crop the centre; 0: resize straight to the size
        eval_resize=properties(dataset)["eval_resize"],
        # filter of that resize: bilinear | bicubic; "": augment.interpolation, as for the crops
        eval_interpolation="",
        subset="",  # a text file with one file name a line: training reads only these images
        shuffle_buffer=16_384,  # encoded records in the shuffle buffer of TFRecord files
        cache=False,  # keep encoded records in memory; small data sets are always kept
        # Assigns splits explicitly: split=folder, as in "train=Training set,test=Holdout", where
        # the right side is a folder, a pattern inside data.dir, a list, or "." for everything.
        # "": the names of the folders decide.
        splits="",
        labels="",  # a file with lines "FILE,CLASS" (comma or tab) for images without labels
        # Pixel values that map to 0..255 for images with more than 8 bits a channel: full (all 16
        # bits) | image (from each image's minimum to its maximum) | two numbers, as in "0,4095".
        range="full",
        max_pixels=178_956_970,  # images with more pixels count as unreadable
        max_unreadable=10,  # unreadable images that a run may skip whatever the data set's size
        max_unreadable_percent=1.0,  # the same in percent of the images; the larger limit applies
    )
