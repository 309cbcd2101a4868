"""CutMix: replaces a box of one image with the same box of another."""

import jax
import jax.numpy as jnp
from jax import Array


def cutmix(images: Array, others: Array, ratio: Array, centre: Array) -> tuple[Array, Array]:
    """Replaces a box of each image with that of another image.

    CutMix (arXiv:1905.04899) as in BINGO's code: along each axis the box has length
    int(side * sqrt(1 - ratio)). It extends half of that, rounded down, to both sides of the centre
    and is clipped to the image.

    Args:
      images: f32[B, H, W, C].
      others: f32[B, H, W, C], the source of the boxes.
      ratio: f32[B] in [0, 1], the fraction of each of `images` to keep before clipping.
      centre: i32[B, 2], row and column.

    Returns:
      f32[B, H, W, C] and f32[B], the fraction of each of `images` that is kept after clipping.
    """
    inside = []
    for axis in (0, 1):
        side = images.shape[1 + axis]
        half = jnp.floor(side * jnp.sqrt(1 - ratio)).astype(jnp.int32) // 2
        low, high = ((centre[:, axis] + offset)[:, None] for offset in (-half, half))
        index = jnp.arange(side)[None]
        inside.append((index >= low) & (index < high))
    box = inside[0][:, :, None] & inside[1][:, None, :]
    fraction = 1 - jnp.mean(box.astype(jnp.float32), axis=(1, 2))
    return jnp.where(box[..., None], others, images), fraction


def draw_boxes(rng: Array, groups: Array, height: int, width: int) -> tuple[Array, Array]:
    """Draws the arguments `ratio` ~ Beta(2, 2) and `centre`, uniform, of `cutmix`.

    Args:
      rng: a random key.
      groups: i32[B], the group of each image; images of a group share a box.
      height, width: of the images in px.

    Returns:
      f32[B] and i32[B, 2].
    """
    return jax.vmap(lambda group: _draw_box(jax.random.fold_in(rng, group), height, width))(groups)


def _draw_box(rng: Array, height: int, width: int) -> tuple[Array, Array]:
    ratio_key, row_key, column_key = jax.random.split(rng, 3)
    centre = [
        jax.random.randint(key, (), 0, side)
        for key, side in ((row_key, height), (column_key, width))
    ]
    return jax.random.beta(ratio_key, 2.0, 2.0), jnp.stack(centre)
