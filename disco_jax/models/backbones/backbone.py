"""Base class of backbones: properties by which other code distinguishes them, not by name."""

from typing import ClassVar

import flax.linen as nn

from disco_jax.models.layers.compute import Compute

# Stems of convolutional networks: for images of about 224 px, and for 16 to 64 px.
STEMS = ("imagenet", "small")


class Backbone(nn.Module, kw_only=True):
    """Base class of backbones.

    A backbone maps images float[B, H, W, 3] and a BatchNorm mode to features f32[B, out_features].

    Attributes:
      compute: how layers are computed.
    """

    is_transformer: ClassVar[bool] = False
    # Learning rate of the linear probes of DisCo, SEED and RETRO, for a batch of 256.
    probe_rate: ClassVar[float] = 30.0
    compute: Compute = Compute()

    @property
    def out_features(self) -> int:
        """Number of features."""
        raise NotImplementedError

    @property
    def readable_blocks(self) -> int:
        """Number of last blocks whose outputs evaluations may read as features."""
        return 1

    @property
    def nominal_size(self) -> int | None:
        """Side in px of the images that a position embedding is stored for; None without one."""
        return None
