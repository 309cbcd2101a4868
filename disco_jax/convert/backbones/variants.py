"""Names of the backbones of a class."""

from typing import Any

import flax.linen as nn

from disco_jax.models.backbones import BACKBONES


def variants(cls: type[nn.Module], **fields: Any) -> list[str]:
    """Returns the backbones of a class whose networks have these fields, in table order."""
    names = []
    for name, (kind, variant) in BACKBONES.items():
        if kind is cls:
            network = kind(**variant)
            if all(getattr(network, field) == value for field, value in fields.items()):
                names.append(name)
    return names
