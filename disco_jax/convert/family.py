"""The declarations of one family of backbones for reading and writing its checkpoints.

A family is one module in `disco_jax.convert.backbones` that ends with a `Family`. `recognise`,
`load` and `save` iterate over these declarations; they know no family by name.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from disco_jax.convert.names import ModuleMap

State = Mapping[str, np.ndarray]


class Layout(NamedTuple):
    """A naming of the weights of a family of backbones, and the code bases that use it.

    Two families may declare layouts of the same name and signature; their `spec` tells them apart.

    Attributes:
      name: for manifests and messages.
      signature: keys that every state dict in this layout has, relative to the backbone. The
        first is the weight of a convolution.
      modules: yields the modules of a backbone under both names.
      spec: returns the config fields of a backbone's state dict, `backbone` at least; None if its
        shapes are those of no backbone in `models.BACKBONES`.
      own: prefixes of keys that belong to the backbone although they carry the name of a head.
      only: the only code base that uses this layout; "": several do.
      encoder_q: code bases that write it under `encoder_q.`, with a second encoder of an equal and
        of another layout; (): MoCo.
      authors: the code base of checkpoints whose head and prefix do not identify one, before the
        prefix `module.` is considered.
      default: returns the code base of the remaining checkpoints.
    """

    name: str
    signature: tuple[str, ...]
    modules: Callable[[Any], Iterator[ModuleMap]]
    spec: Callable[[State], dict[str, Any] | None] = lambda state: None
    own: tuple[str, ...] = ()
    only: str = ""
    encoder_q: tuple[str, ...] = ()
    authors: str = ""
    default: Callable[[State], str] = lambda state: "torchvision"


class Export(NamedTuple):
    """A backbone under the names of another code base.

    Attributes:
      modules: yields the modules of the backbone under both names.
      model: the framework's model that computes the same and loads the written weights; "": only
        the names are the framework's, which has no such model.
      classifier: the name of the classifier, under which a projection head is written.
      epsilon: added to the variance by the model's BatchNorm; None: the backbone's own.
      read_as: the backbone here that computes with the written weights what `model` computes; "":
        the exported one.
      finish: the last change to the finished state dict.
    """

    modules: Callable[[Any], Iterator[ModuleMap]]
    model: str = ""
    classifier: str = "classifier"
    epsilon: float | None = None
    read_as: str = ""
    finish: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of backbones.

    Attributes:
      layouts: the layouts that are read, more specific ones first.
      exports: naming of `save.NAMINGS` -> backbone -> `Export`.
      aliases: other name of an architecture -> backbone.
      variant_of: backbone -> the one of equal shapes that the shapes are recognised as.
      by_code_base: (code base, recognised backbone) -> the backbone that computes what the code
        base does.
      refused: (code base, backbone) -> the rest of the error message for such a checkpoint.
      priority: families with lower numbers are searched first. It matters where a state dict has
        the signatures of two families: XCiTs have those of ViTs.
      translate: renames keys of a state dict to those of `layouts`; other keys are unchanged.
    """

    layouts: tuple[Layout, ...]
    exports: Mapping[str, Mapping[str, Export]]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    variant_of: Mapping[str, str] = dataclasses.field(default_factory=dict)
    by_code_base: Mapping[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    refused: Mapping[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    priority: int = 0
    translate: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict


def count_children(state: Iterable[str], root: str) -> int:
    """Returns the number of numbered children under `root`."""
    pattern = re.compile(re.escape(root) + r"\.(\d+)\.")
    return len({match[1] for key in state if (match := pattern.match(key))})
