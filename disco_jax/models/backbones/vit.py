"""Vision transformers (arXiv:2010.11929) as DINO (arXiv:2104.14294) runs them.

Images of any size: the learned position embedding is resized bicubically. DINO's code maps the
coordinates with the scale (size // patch + 0.1) / grid instead of the ratio of the grids; weights
trained with it expect it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from disco_jax.models.layers.attention import Mlp, layer_norm, linear, split_heads
from disco_jax.models.layers.dropout import drop_path
from disco_jax.models.layers.initializers import narrow, torch_bias, torch_kernel


class ViT(nn.Module):
    """Transformer whose features are the class token after the last LayerNorm.

    Attributes:
      width: of a token.
      heads: of each attention.
      patch: side of a patch in px.
      depth: blocks.
      grid: patches a side that the position embedding is stored for.
      drop_path: stochastic depth of the last block; grows linearly from 0 at the first.
      norm_group: takes no effect; there is no BatchNorm.
      dtype: of the computation; parameters stay float32.
    """

    width: int
    heads: int
    patch: int = 16
    depth: int = 12
    grid: int = 14
    drop_path: float = 0.0
    norm_group: int = 0
    dtype: jnp.dtype = jnp.float32

    @property
    def out_features(self) -> int:
        """D of its features."""
        return self.width

    @nn.compact
    def __call__(self, images: Array, *, norm: str, blocks: int = 1) -> Array:
        """float[B, H, W, 3] -> features f32[B, blocks * width].

        Args:
          images: normalised; H and W at least `patch`.
          norm: takes no effect; there is no BatchNorm.
          blocks: the class tokens of so many last blocks side by side, each after the last
            LayerNorm, oldest first; DINO's linear probe of small models takes 4.
        """
        del norm
        x = self._patches(images.astype(self.dtype))
        tokens = []
        for i in range(self.depth):
            rate = self.drop_path * i / max(self.depth - 1, 1)
            x = Block(self.heads, rate, self.dtype, name=f"block{i}")(x)
            tokens.append(x[:, 0])
        last = layer_norm(self.dtype, name="norm")
        return jnp.concatenate([last(t) for t in tokens[-blocks:]], -1).astype(jnp.float32)

    def _patches(self, images: Array) -> Array:
        """Patches and class token with their positions: float[B, 1 + N, D]."""
        side = (self.patch, self.patch)
        x = nn.Conv(
            self.width,
            side,
            side,
            padding="VALID",
            kernel_init=torch_kernel,
            bias_init=torch_bias(3 * self.patch**2),
            dtype=self.dtype,
            name="patch_conv",
        )(images)
        rows, columns = x.shape[1:3]
        x = x.reshape(x.shape[0], rows * columns, self.width)
        first = self.param("cls_token", narrow, (1, 1, self.width), jnp.float32)
        where = self.param("pos_embed", narrow, (1, 1 + self.grid**2, self.width), jnp.float32)
        if rows * columns != self.grid**2 or images.shape[1] != images.shape[2]:
            where = _resize(where, self.grid, rows, columns)
        first = jnp.broadcast_to(first.astype(self.dtype), (x.shape[0], 1, self.width))
        return jnp.concatenate([first, x], axis=1) + where.astype(self.dtype)


class Block(nn.Module):
    """Self-attention and MLP, each after a LayerNorm and beside the identity.

    Attributes:
      heads: of the attention.
      drop: probability that a branch of an image is left out while training.
      dtype: of the computation.
    """

    heads: int
    drop: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """float[B, N, D] -> float[B, N, D]."""
        y = layer_norm(self.dtype, name="norm1")(x)
        query, key, value = split_heads(
            linear(3 * x.shape[-1], self.dtype, name="qkv")(y), self.heads
        )
        y = jax.nn.dot_product_attention(query, key, value)
        y = linear(x.shape[-1], self.dtype, name="proj")(y.reshape(x.shape))
        x = x + drop_path(self, y, self.drop)
        y = Mlp(self.dtype, name="mlp")(layer_norm(self.dtype, name="norm2")(x))
        return x + drop_path(self, y, self.drop)


def _resize(where: Array, grid: int, rows: int, columns: int) -> Array:
    """The embedding f32[1, 1 + grid^2, D] for `rows` x `columns` patches."""
    table = where[0, 1:].reshape(grid, grid, -1)
    up, across = _bicubic(grid, rows), _bicubic(grid, columns)
    table = jnp.einsum("ai,bj,ijd->abd", up, across, table)
    return jnp.concatenate([where[:, :1], table.reshape(1, rows * columns, -1)], axis=1)


def _bicubic(size: int, target: int) -> np.ndarray:
    """f32[target, size]: rows of the cubic convolution with a = -0.75, borders repeated."""
    scale = (target + 0.1) / size
    source = (np.arange(target) + 0.5) / scale - 0.5
    left = np.floor(source).astype(int)
    matrix = np.zeros((target, size))
    for offset in range(-1, 3):
        weight = _cubic(np.abs(source - (left + offset)))
        np.add.at(matrix, (np.arange(target), np.clip(left + offset, 0, size - 1)), weight)
    return matrix.astype(np.float32)


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


VARIANTS = {
    "vit_tiny_p16": dict(width=192, heads=3),
    "vit_tiny_p32": dict(width=192, heads=3, patch=32, grid=7),
    "vit_small_p16": dict(width=384, heads=6),
    "vit_small_p8": dict(width=384, heads=6, patch=8, grid=28),
    "vit_base_p16": dict(width=768, heads=12),
    "vit_base_p8": dict(width=768, heads=12, patch=8, grid=28),
}
