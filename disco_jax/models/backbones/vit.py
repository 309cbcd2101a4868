"""Vision transformers (arXiv:2010.11929) as DINO (arXiv:2104.14294) runs them.

Images may have any size: the learned position embedding is resized bicubically. DINO's code scales
coordinates by (size // patch + 0.1) / grid instead of the ratio of the grids; weights trained with
it expect that.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from disco_jax.models.backbones.backbone import Backbone
from disco_jax.models.layers.compute import Compute
from disco_jax.models.layers.dropout import drop_path
from disco_jax.models.layers.initializers import narrow, torch_bias, torch_kernel
from disco_jax.models.layers.self_attention import Mlp, layer_norm, linear, split_heads


class ViT(Backbone):
    """Transformer whose features are the class token after the last LayerNorm.

    Attributes:
      width: width of a token.
      heads: heads of each attention layer.
      patch: side of a patch in px.
      depth: blocks.
      grid: patches per side for which the position embedding is stored.
      drop_path: stochastic depth of the last block; grows linearly from 0 at the first block.
    """

    is_transformer: ClassVar[bool] = True
    width: int
    heads: int
    patch: int = 16
    depth: int = 12
    grid: int = 14
    drop_path: float = 0.0

    @property
    def out_features(self) -> int:
        """Number of features."""
        return self.width

    @property
    def readable_blocks(self) -> int:
        """Number of last blocks whose class tokens `__call__` can return."""
        return self.depth

    @property
    def nominal_size(self) -> int:
        """Side in px of the images that the position embedding is stored for."""
        return self.patch * self.grid

    @nn.compact
    def __call__(self, images: Array, *, norm: str, blocks: int = 1) -> Array:
        """Maps images to class tokens.

        Args:
          images: float[B, H, W, 3], normalized; H and W at least `patch`.
          norm: has no effect, as there is no BatchNorm.
          blocks: number of last blocks whose class tokens are returned, each after the last
            LayerNorm; DINO's linear probe of small models reads 4.

        Returns:
          f32[B, blocks * width], class tokens side by side, that of the last block last.
        """
        del norm
        x = self._patches(images.astype(self.compute.dtype))
        tokens = []
        for i in range(self.depth):
            rate = self.drop_path * i / max(self.depth - 1, 1)
            x = Block(self.heads, rate, self.compute, name=f"block{i}")(x)
            tokens.append(x[:, 0])
        last = layer_norm(self.compute, name="norm")
        return jnp.concatenate([last(t) for t in tokens[-blocks:]], -1).astype(jnp.float32)

    def _patches(self, images: Array) -> Array:
        """Embeds patches and class token with their positions: float[B, 1 + N, D]."""
        side = (self.patch, self.patch)
        x = nn.Conv(
            self.width,
            side,
            side,
            padding="VALID",
            kernel_init=torch_kernel,
            bias_init=torch_bias(3 * self.patch**2),
            dtype=self.compute.dtype,
            name="patch_conv",
        )(images)
        rows, columns = x.shape[1:3]
        x = x.reshape(x.shape[0], rows * columns, self.width)
        token = self.param("cls_token", narrow, (1, 1, self.width), jnp.float32)
        positions = self.param("pos_embed", narrow, (1, 1 + self.grid**2, self.width), jnp.float32)
        if rows * columns != self.grid**2 or images.shape[1] != images.shape[2]:
            positions = _resize(positions, self.grid, rows, columns)
        token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
        return jnp.concatenate([token, x], axis=1) + positions.astype(x.dtype)


class Block(nn.Module):
    """Self-attention and MLP, each after a LayerNorm and beside the identity.

    Attributes:
      heads: heads of the attention layer.
      drop: probability that a branch of an image is dropped while training.
      compute: how layers are computed.
    """

    heads: int
    drop: float
    compute: Compute

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps float[B, N, D] to float[B, N, D]."""
        width = x.shape[-1]
        y = layer_norm(self.compute, name="norm1")(x)
        query, key, value = split_heads(linear(self.compute, 3 * width, name="qkv")(y), self.heads)
        y = jax.nn.dot_product_attention(query, key, value)
        y = linear(self.compute, width, name="proj")(y.reshape(x.shape))
        x = x + drop_path(self, y, self.drop)
        y = Mlp(self.compute, name="mlp")(layer_norm(self.compute, name="norm2")(x))
        return x + drop_path(self, y, self.drop)


def _resize(positions: Array, grid: int, rows: int, columns: int) -> Array:
    """Resizes the position embedding f32[1, 1 + grid^2, D] to `rows` x `columns` patches."""
    table = positions[0, 1:].reshape(grid, grid, -1)
    vertical, horizontal = _bicubic(grid, rows), _bicubic(grid, columns)
    table = jnp.einsum("ai,bj,ijd->abd", vertical, horizontal, table)
    return jnp.concatenate([positions[:, :1], table.reshape(1, rows * columns, -1)], axis=1)


def _bicubic(size: int, target: int) -> np.ndarray:
    """Returns the matrix f32[target, size] of cubic interpolation (a = -0.75), edges repeated."""
    scale = (target + 0.1) / size
    source = (np.arange(target) + 0.5) / scale - 0.5
    floor = np.floor(source).astype(int)
    matrix = np.zeros((target, size))
    for offset in range(-1, 3):
        weight = _cubic(np.abs(source - (floor + offset)))
        np.add.at(matrix, (np.arange(target), np.clip(floor + offset, 0, size - 1)), weight)
    return matrix.astype(np.float32)


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Evaluates the kernel of cubic convolution."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


FAMILY = ViT
VARIANTS: dict[str, dict[str, Any]] = {
    "vit_tiny_p16": dict(width=192, heads=3),
    "vit_tiny_p32": dict(width=192, heads=3, patch=32, grid=7),
    "vit_small_p16": dict(width=384, heads=6),
    "vit_small_p8": dict(width=384, heads=6, patch=8, grid=28),
    "vit_base_p16": dict(width=768, heads=12),
    "vit_base_p8": dict(width=768, heads=12, patch=8, grid=28),
}
