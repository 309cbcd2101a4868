"""Properties of the data sets of pretraining configs."""

from typing import Any

# What differs between data sets: the split that evaluations read, the image size in px, the shorter
# side in px before evaluations crop the centre (0: resize straight to `size`), and the stem of
# convolutional networks.
DATA: dict[str, dict[str, Any]] = {
    "imagenet2012": dict(eval_split="validation", size=224, eval_resize=256, stem="imagenet"),
    "fashion_mnist": dict(eval_split="test", size=28, eval_resize=0, stem="small"),
    "digits": dict(eval_split="test", size=16, eval_resize=0, stem="small"),
}


def properties(dataset: str) -> dict[str, Any]:
    """Returns the entry of `DATA`; data sets without one are treated like ImageNet."""
    return DATA.get(dataset, DATA["imagenet2012"])
