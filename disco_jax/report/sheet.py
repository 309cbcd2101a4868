"""Contact sheet: augmented views as the networks see them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from disco_jax.data import decode
from disco_jax.data.arrays import crop_all
from disco_jax.data.contract import Source
from disco_jax.data.data_settings import build_views
from disco_jax.errors import UserError
from disco_jax.report import build
from disco_jax.run.metrics import Logger
from disco_jax.train.run_settings import RunSettings

IMAGES = 8
_TILE = (64, 128)  # smallest and largest tile, px; views are scaled to fit
GAP = 4  # px between tiles


def draw(settings: RunSettings, workdir: str, source: Source) -> np.ndarray:
    """Saves and returns the contact sheet of a run, u8[H, W, 3]; see `sheet`."""
    image = sheet(settings, source)
    build.keep_sheet(workdir, image)
    return image


def show(
    settings: RunSettings, source: Source, path: epath.Path, logger: Logger, step: int
) -> None:
    """Draws and logs the contact sheet of augmented views at a run's first start."""
    if settings.log.report and not step and jax.process_index() == 0:
        with build.optional("contact sheet"):
            logger.write_image(step, "views", draw(settings, str(path), source))


def sheet(settings: RunSettings, source: Source) -> np.ndarray:
    """Draws views of the first readable images of the training split, without normalization.

    Crops are drawn as on the host, followed by the recipe's photometric operations, as in a step.
    Values outside 0..1 are clipped. All views show the same image, even if the recipe uses bags.

    Args:
      settings: settings of a pretraining run.
      source: images of the run.

    Returns:
      u8[H, W, 3]: a column per image with the image itself at the top, and a row per view.

    Raises:
      UserError: if no image can be read.
    """
    recipe = build_views(settings.augment, settings.views, settings.local)
    images = list(itertools.islice(_images(source, settings.data.train_split), IMAGES))
    if not images:
        raise UserError(f"No image of the split {settings.data.train_split!r} can be read.")
    crops = {
        v: jnp.asarray(crop_all(images, crop, (settings.seed, 0, 0, v, 0), map))
        for v, crop in enumerate(recipe.crops)
    }
    key = jax.random.key(settings.seed)
    augmented = jax.device_get(jax.jit(recipe.photometric)(crops, key, jnp.arange(len(images))))
    tile = int(np.clip(max(recipe.sizes), *_TILE))
    rows = [[_fit(image, tile) for image in images]]
    for view, view_images in augmented.items():
        operations = recipe.photometric_ops[view]
        pixels = view_images * np.float32(operations.std) + np.float32(operations.mean)
        view_tiles = np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
        side = max(tile * recipe.sizes[view] // max(recipe.sizes), 1)
        rows.append([_tile(image, side, tile) for image in view_tiles])
    return _lay_out(rows, tile)


def _images(source: Source, split: str):
    """Yields decoded images of a split; skips unreadable ones."""
    for _, picture, _ in source.iter_images(split):
        try:
            image = picture if isinstance(picture, np.ndarray) else decode.decode(picture)
        except decode.Unreadable:
            continue
        three = image if image.ndim == 3 else image[..., None]
        yield np.broadcast_to(three, (*three.shape[:2], 3))


def _fit(image: np.ndarray, tile: int) -> np.ndarray:
    """Scales a whole image into a white square, with its aspect ratio preserved."""
    side = max(image.shape[:2])
    height, width = (max(round(tile * length / side), 1) for length in image.shape[:2])
    return _frame(_resize(image, width, height), tile)


def _tile(image: np.ndarray, side: int, tile: int) -> np.ndarray:
    return _frame(_resize(image, side, side), tile)


def _resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resizes with nearest neighbours to enlarge and with averages to shrink."""
    method = Image.Resampling.BOX if width < image.shape[1] else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((width, height), method))


def _frame(image: np.ndarray, tile: int) -> np.ndarray:
    out = np.full((tile, tile, 3), 255, np.uint8)
    height, width = image.shape[:2]
    top, left_edge = (tile - height) // 2, (tile - width) // 2
    out[top : top + height, left_edge : left_edge + width] = image
    return out


def _lay_out(rows: list[list[np.ndarray]], tile: int) -> np.ndarray:
    step = tile + GAP
    shape = (len(rows) * step + GAP, len(rows[0]) * step - GAP)
    out = np.full((*shape, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        top = i * step + (2 * GAP if i else 0)  # extra space below the original images
        for j, picture in enumerate(row):
            out[top : top + tile, j * step : j * step + tile] = picture
    return out
