"""The contact sheet: augmented views as the networks see them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from disco_jax.data import decode, views
from disco_jax.data.arrays import crop_all
from disco_jax.data.base import Source
from disco_jax.errors import UserError

IMAGES = 8
_TILE = (64, 128)  # px of a tile: small views are shown larger, large ones smaller
GAP = 4  # px between tiles


def sheet(config: ConfigDict, source: Source) -> np.ndarray:
    """Views of the first readable images of the training split, their normalisation undone.

    Crops as the host draws them, then the recipe's photometric operations, as in a step; values
    that left 0..1 are cut off. Members of bags are not looked up: all views are of one image.

    Args:
      config: of a pretraining run.
      source: its images.

    Returns:
      u8[H, W, 3]: a column an image, at its top the image itself; a row a view.

    Raises:
      UserError: no image can be read.
    """
    recipe = views.build(config.augment, config.views, config.local)
    images = list(itertools.islice(_images(source, config.data.train_split), IMAGES))
    if not images:
        raise UserError(f"No image of the split {config.data.train_split!r} can be read.")
    crops = {
        v: jnp.asarray(crop_all(images, crop, (config.seed, 0, 0, v, 0), map))
        for v, crop in enumerate(recipe.crops)
    }
    key = jax.random.key(config.seed)
    seen = jax.device_get(jax.jit(recipe.photometric)(crops, key, jnp.arange(len(images))))
    tile = int(np.clip(max(recipe.sizes), *_TILE))
    rows = [[_fitted(image, tile) for image in images]]
    for view, made in seen.items():
        operations = recipe.photometric_ops[view]
        back = made * np.float32(operations.std) + np.float32(operations.mean)
        shown = np.round(np.clip(back, 0, 1) * 255).astype(np.uint8)
        side = max(tile * recipe.sizes[view] // max(recipe.sizes), 1)
        rows.append([_tile(one, side, tile) for one in shown])
    return _laid_out(rows, tile)


def _images(source: Source, split: str):
    """Decoded images of a split, those that cannot be read left out."""
    for _, picture, _ in source.iter_images(split):
        try:
            image = picture if isinstance(picture, np.ndarray) else decode.decode(picture)
        except decode.Unreadable:
            continue
        three = image if image.ndim == 3 else image[..., None]
        yield np.broadcast_to(three, (*three.shape[:2], 3))


def _fitted(image: np.ndarray, tile: int) -> np.ndarray:
    """A whole image, its proportions kept, in a white square."""
    side = max(image.shape[:2])
    height, width = (max(round(tile * length / side), 1) for length in image.shape[:2])
    return _framed(_resized(image, width, height), tile)


def _tile(image: np.ndarray, side: int, tile: int) -> np.ndarray:
    return _framed(_resized(image, side, side), tile)


def _resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Pixels stay visible where an image grows; where it shrinks they are averaged."""
    method = Image.Resampling.BOX if width < image.shape[1] else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((width, height), method))


def _framed(image: np.ndarray, tile: int) -> np.ndarray:
    out = np.full((tile, tile, 3), 255, np.uint8)
    height, width = image.shape[:2]
    top, left = (tile - height) // 2, (tile - width) // 2
    out[top : top + height, left : left + width] = image
    return out


def _laid_out(rows: list[list[np.ndarray]], tile: int) -> np.ndarray:
    step = tile + GAP
    shape = (len(rows) * step + GAP, len(rows[0]) * step - GAP)
    out = np.full((*shape, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        top = i * step + (2 * GAP if i else 0)  # the images themselves stand apart
        for j, picture in enumerate(row):
            out[top : top + tile, j * step : j * step + tile] = picture
    return out
