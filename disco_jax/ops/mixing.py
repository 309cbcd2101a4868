"""CutMix: a box of one image in the place of another's."""

import jax
import jax.numpy as jnp
from jax import Array


def cutmix(images: Array, others: Array, ratio: Array, centre: Array) -> tuple[Array, Array]:
    """Images with one box of others, the same for the whole batch.

    CutMix (arXiv:1905.04899) as BINGO's code cuts it: of side int(side * sqrt(1 - ratio)) along
    both axes, half of that (rounded down) to both sides of the centre, clipped to the image.

    Args:
      images: f32[B, H, W, C].
      others: f32[B, H, W, C], what the box is taken from.
      ratio: f32[] in [0, 1], the share of `images` that is meant to stay.
      centre: i32[2], row and column.

    Returns:
      f32[B, H, W, C] and f32[], the share that stays after the clipping.
    """
    inside = []
    for axis in (0, 1):
        side = images.shape[1 + axis]
        half = jnp.floor(side * jnp.sqrt(1 - ratio)).astype(jnp.int32) // 2
        place = jnp.arange(side)
        inside.append((place >= centre[axis] - half) & (place < centre[axis] + half))
    box = inside[0][:, None] & inside[1][None, :]
    kept = 1 - jnp.mean(box.astype(jnp.float32))
    return jnp.where(box[None, :, :, None], others, images), kept


def draw_box(rng: Array, height: int, width: int) -> tuple[Array, Array]:
    """Arguments `ratio` ~ Beta(2, 2) and `centre`, uniform, of `cutmix`."""
    ratio_key, row_key, column_key = jax.random.split(rng, 3)
    centre = [
        jax.random.randint(key, (), 0, side)
        for key, side in ((row_key, height), (column_key, width))
    ]
    return jax.random.beta(ratio_key, 2.0, 2.0), jnp.stack(centre)
