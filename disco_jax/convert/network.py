"""Position of one network in a state dict: the prefix, layout and head of its keys."""

import dataclasses
from typing import Any

from disco_jax.convert.family import Layout

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Input normalisation of the families that do not use ImageNet's.
_NORMALISATION = {
    "swav": (IMAGENET_MEAN, (0.228, 0.224, 0.225)),
    "deepcluster_v2": (IMAGENET_MEAN, (0.228, 0.224, 0.225)),
    "simclr": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The prefixes of one network's keys in a state dict.

    Attributes:
      root: of all its keys.
      backbone: of the backbone's keys, relative to `root`.
      head: of the head's keys if they are not under `root` (SimReg's predictor).
      family: the only family that uses these prefixes; "": several do.
    """

    root: str
    backbone: str = ""
    head: str = ""
    family: str = ""


@dataclasses.dataclass(frozen=True)
class Head:
    """A projection head in a state dict.

    Attributes:
      root: the start of its keys, relative to the network's prefix.
      linear: the names of its linear layers relative to the root, in order; ("",) for a single one.
      norm: the names of its BatchNorm layers.
      prototypes: the names of the prototype layers, relative to the network's prefix.
      order: one letter per layer, in order: L linear, N BatchNorm, ? any other.
      classifiers: the starts of the keys of classifiers, relative to the network's prefix.
    """

    root: str = ""
    linear: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()
    prototypes: tuple[str, ...] = ()
    order: str = ""
    classifiers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Recognised:
    """A recognised network in a state dict.

    Attributes:
      family: one of `recognise.FAMILIES`.
      prefix: of its keys.
      layout: of its backbone's keys.
      head: the names of its head's layers.
      spec: the config fields that describe the network.
    """

    family: str
    prefix: Prefix
    layout: Layout
    head: Head
    spec: dict[str, Any]

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel for images in [0, 1]."""
        return _NORMALISATION.get(self.family, (IMAGENET_MEAN, IMAGENET_STD))
