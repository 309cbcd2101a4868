"""Augmentation recipes: crops on the host, photometric operations in the training step."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from disco_jax.data import crops
from disco_jax.errors import UserError, did_you_mean, unknown
from disco_jax.ops import augment as ops

# The operations allowed in `order`. The index in this table is also the column of the draw that
# decides whether the operation is applied, so omitting one does not change the draws of others.
OPERATIONS: dict[str, Callable[..., Array]] = {
    "flip": ops.flip,
    "jitter": ops.jitter,
    "grey": ops.grayscale,
    "blur": ops.gaussian_blur,
    "solarize": ops.solarize,
}
# Settings that accept a value per global view; the two views of DINO and ReSSL differ in them.
PER_VIEW = ("jitter_prob", "grey_prob", "blur_prob", "solarize_prob")
# From this number of views with the same size and operations on, a loop that is compiled once
# augments them.
LOOP_MIN_VIEWS = 3
INTERPOLATIONS = ("bilinear", "bicubic")
ANTIALIAS = ("exact", "area", "none")


@dataclasses.dataclass(frozen=True)
class Crop:
    """Parameters of torchvision's RandomResizedCrop for one view, applied on the host.

    Attributes:
      size: height and width of the crop after resizing, in pixels.
      scale: (lowest, highest) fraction of the image area covered by the crop.
      ratio: (lowest, highest) width / height of the crop.
      interpolation: "bilinear" or "bicubic".
      antialias: "exact", "area" or "none", see `decode.resize`.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: str
    antialias: str


@dataclasses.dataclass(frozen=True)
class Photometric:
    """Photometric augmentation of one view in the training step, distributed as in torchvision.

    Operations of probability 0 and jitter of strength 0 are omitted from the compiled step.

    Attributes:
      order: names in `OPERATIONS`, in the order of application.
      flip_prob: probability of a horizontal flip.
      jitter: strengths x of brightness, contrast and saturation with factors
        ~ U(max(0, 1-x), 1+x), and strength h <= 0.5 of hue with a shift ~ U(-h, h) turns.
      jitter_prob: probability of applying all four jitter operations.
      grey_prob: probability of conversion to greyscale.
      blur_prob: probability of a Gaussian blur.
      blur_sigma: (lo, hi) in pixels, sigma ~ U(lo, hi).
      solarize_prob: probability of inverting the values in the upper half of the range.
      mean: per-channel mean, subtracted at the end.
      std: per-channel standard deviation, divided by at the end.
    """

    order: tuple[str, ...]
    flip_prob: float
    jitter: tuple[float, float, float, float]
    jitter_prob: float
    grey_prob: float
    blur_prob: float
    blur_sigma: tuple[float, float]
    solarize_prob: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: Array, key: Array, positions: Array) -> Array:
        """Augments and normalises images.

        Args:
          images: u8[B, H, W, 3].
          key: PRNG key of this view and step, equal on every replica.
          positions: i32[B], index of each image in the global batch.

        Returns:
          f32[B, H, W, 3], normalised by `mean` and `std`.

        Raises:
          AssertionError: a shape or dtype is wrong; raised during tracing.
        """
        draws = self.draw(key, positions)
        images = _unit(images)
        if {"blur", "flip"} <= draws.keys():
            # A flip commutes with all operations, and the blur matrix includes it at no cost.
            draws["blur"] += draws.pop("flip")
        for name in filter(draws.__contains__, self.active):
            images = OPERATIONS[name](images, *draws[name])
        return ops.normalize(images, self.mean, self.std)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the operations that can change an image, in the order of application."""
        strength = {**dict.fromkeys(OPERATIONS, 1.0), "jitter": max(self.jitter)}
        return tuple(n for n in self.order if self.probability(n) > 0 and strength[n] > 0)

    def probability(self, name: str) -> float:
        """Returns the probability in [0, 1] of the operation `name`."""
        return getattr(self, f"{name}_prob")

    def draw(self, key: Array, positions: Array) -> dict[str, tuple[Array, ...]]:
        """Draws the random arguments of every active operation.

        The draws of an image depend only on the key and on its index in the global batch, so they
        are the same on any number of devices.

        Args:
          key: PRNG key of this view and step, equal on every replica.
          positions: i32[B], index of each image in the global batch.

        Returns:
          {"flip": (bool[B],), "jitter": (f32[B, 4], i32[4]), "grey": (bool[B],),
          "blur": (f32[B],), "solarize": (bool[B],)}, restricted to active operations: the
          arguments that follow the images. Images without jitter have factors (1, 1, 1, 0), images
          without blur have sigma 0.

        Raises:
          AssertionError: a shape or dtype is wrong; raised during tracing.
        """
        chex.assert_type(positions, jnp.int32)
        chex.assert_rank(positions, 1)
        order_key, image_key = jax.random.split(key)
        chance, amount = _uniforms(image_key, positions)
        columns = {name: i for i, name in enumerate(OPERATIONS)}
        masks = {n: chance[:, columns[n]] < self.probability(n) for n in self.active}
        draws: dict[str, tuple[Array, ...]] = {n: (mask,) for n, mask in masks.items()}
        if "blur" in masks:
            draws["blur"] = (self._sigma(masks["blur"], amount[:, 4]),)
        if "jitter" in masks:
            # torchvision draws an order per image. Here the whole batch shares one order: with an
            # order per image, each of the four positions would compute all four operations for
            # every image and discard three. The order follows from the key, so replicas agree.
            order = jax.random.permutation(order_key, jnp.arange(4, dtype=jnp.int32))
            draws["jitter"] = (self._factors(masks["jitter"], amount[:, :4]), order)
        return draws

    def _sigma(self, mask: Array, amount: Array) -> Array:
        """Returns f32[B], the sigma of the blur in pixels, 0 where the mask is False."""
        low, high = self.blur_sigma
        return jnp.where(mask, low + (high - low) * amount, 0.0)

    def _factors(self, mask: Array, amount: Array) -> Array:
        """Returns f32[B, 4], the jitter factors, neutral where the mask is False."""
        *strengths, turns = self.jitter
        low = jnp.asarray([[*(max(0.0, 1.0 - x) for x in strengths), -turns]], jnp.float32)
        high = jnp.asarray([[*(1.0 + x for x in strengths), turns]], jnp.float32)
        neutral = jnp.asarray([[1.0, 1.0, 1.0, 0.0]], jnp.float32)
        return jnp.where(mask[:, None], low + (high - low) * amount, neutral)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The augmentation of all views of an image, global views first.

    Attributes:
      crops: crop of each view, applied on the host.
      photometric_ops: photometric augmentation of each view, applied in the training step.
    """

    crops: tuple[Crop, ...]
    photometric_ops: tuple[Photometric, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Side length of every view, in pixels."""
        return tuple(crop.size for crop in self.crops)

    def photometric(
        self, views: Mapping[int, Array], key: Array, positions: Array
    ) -> dict[int, Array]:
        """Augments and normalises views, with independent draws for each view.

        Args:
          views: {v: u8[B, H, W, 3]}, where v is the number of a view of this recipe.
          key: PRNG key of this step, equal on every replica.
          positions: i32[B], index of each image in the global batch.

        Returns:
          {v: f32[B, H, W, 3]}, normalised.

        Raises:
          AssertionError: a shape or dtype is wrong; raised during tracing.
        """
        augmented = {}
        for group in self._alike(views):
            operations = self.photometric_ops[group[0]]
            keys = [jax.random.fold_in(key, view) for view in group]
            if len(group) < LOOP_MIN_VIEWS:
                for view, view_key in zip(group, keys, strict=True):
                    augmented[view] = operations(views[view], view_key, positions)
                continue
            stacked = jnp.stack([views[view] for view in group])
            out = jax.lax.map(
                lambda pair, run=operations: run(pair[1], pair[0], positions),
                (jnp.stack(keys), stacked),
            )
            augmented.update(zip(group, out, strict=True))
        return {view: augmented[view] for view in views}

    def _alike(self, views: Mapping[int, Array]) -> list[list[int]]:
        """Groups the view numbers by size and operations."""
        groups: dict[Any, list[int]] = {}
        for view, images in views.items():
            groups.setdefault((images.shape, self.photometric_ops[view]), []).append(view)
        return list(groups.values())

    def plain(self, images: Array) -> Array:
        """Normalises images without augmentation, for evaluation.

        Args:
          images: u8[B, H, W, 3].

        Returns:
          f32[B, H, W, 3], normalised by the mean and std of view 0.

        Raises:
          AssertionError: a shape or dtype is wrong; raised during tracing.
        """
        first = self.photometric_ops[0]
        return ops.normalize(_unit(images), first.mean, first.std)


def pixel_scale_ratio(
    large: Crop, small: Crop, height: int = 375, width: int = 500, draws: int = 20_000
) -> float:
    """Estimates the mean ratio of pixel scales of global and local views.

    In SSLight (arXiv:2210.02808, eq. 1) the pixel scale PS of a view is its final area over the
    area it covers of the image; the ratio is the mean of PS_global / PS_local over pairs of crops.
    The crops have the pipeline's distribution and a fixed seed.

    Args:
      large: crop of the global view.
      small: crop of the local view.
      height: height of the image in pixels; by default ImageNet's most frequent size.
      width: width of the image in pixels; by default ImageNet's most frequent size.
      draws: number of crops of each kind.
    """
    sides = np.full(draws, height), np.full(draws, width)
    scales = []
    for view, crop in enumerate((large, small)):
        uniforms = crops.uniforms(0, 0, 0, view, 0, draws)
        box = crops.boxes(uniforms, *sides, crop.scale, crop.ratio)
        scales.append(crop.size**2 / (box[:, 2] * box[:, 3]))
    return float(np.mean(scales[0] / scales[1]))


def build(
    augment: Mapping[str, Any], count: int = 2, local: Mapping[str, Any] | None = None
) -> Recipe:
    """Builds the recipe of global and local views from config settings.

    Args:
      augment: a mapping with all fields of a preset in `presets.py`. The fields in
        `PER_VIEW` may be tuples with a number for each global view.
      count: number of global views, at least 1.
      local: fields of `presets.LOCALS`, the number of local views and the settings in which they
        differ from global views; None for no local views.

    Raises:
      UserError: a field is missing, unknown or out of range; the message names it as
        config.augment.FIELD or config.local.FIELD.
    """
    assert count >= 1, count
    settings = _ViewSettings({name: augment[name] for name in augment})
    _check_fields(settings)
    views = [_for_global_view(settings, view, count) for view in range(count)]
    num_local = 0 if local is None else local["count"]
    if not isinstance(num_local, numbers.Integral) or int(num_local) < 0:
        raise UserError(f"config.local.count={num_local!r} is invalid; use 0 or more views.")
    if local is not None and num_local:
        changes = {name: local[name] for name in local if name != "count"}
        views += [_ViewSettings({**settings, **changes}, changes.keys())] * num_local
    for view in views:
        for check in (_check_crop, _check_order, _check_photometric, _check_unused):
            check(view)
    return Recipe(
        tuple(_make(Crop, view) for view in views),
        tuple(_make(Photometric, view) for view in views),
    )


class _ViewSettings(dict):
    """Settings of a view that remember the config section of each field."""

    def __init__(self, values: Mapping[str, Any], local: Iterable[str] = ()):
        super().__init__(values)
        self._local = frozenset(local)

    def name(self, field: str) -> str:
        return f"config.{'local' if field in self._local else 'augment'}.{field}"


def _for_global_view(settings: _ViewSettings, view: int, count: int) -> _ViewSettings:
    """Returns the settings of one global view, resolving fields with a value per view."""
    view_settings = _ViewSettings(settings)
    for field in PER_VIEW:
        if isinstance(settings[field], (tuple, list)):
            allowed = f"a probability in 0..1, or {count} of them, one for each global view"
            _require(len(settings[field]) == count, settings, field, allowed)
            view_settings[field] = settings[field][view]
    return view_settings


def _make(cls: type, settings: Mapping[str, Any]) -> Any:
    values = {name: settings[name] for name in _names(cls)}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _unit(images: Array) -> Array:
    """Converts u8[B, H, W, 3] to f32[B, H, W, 3] in [0, 1]."""
    chex.assert_type(images, jnp.uint8)
    # One channel at a time, because the following operations read them so.
    planes = (images[..., channel].astype(jnp.float32) / 255.0 for channel in range(3))
    return jnp.stack(tuple(planes), axis=-1)


def _uniforms(key: Array, positions: Array) -> tuple[Array, Array]:
    """Draws f32[B, 5] and f32[B, 5] in [0, 1) for each image.

    The first holds one draw per operation, the second the four jitter amounts and the blur sigma.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)
    draws = jax.vmap(lambda k: jax.random.uniform(k, (len(OPERATIONS) + 5,)))(keys)
    return draws[:, : len(OPERATIONS)], draws[:, len(OPERATIONS) :]


def _names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _check_fields(settings: Mapping[str, Any]) -> None:
    allowed = _names(Crop) + _names(Photometric)
    for field in settings:
        if field not in allowed:
            raise UserError(
                f"config.augment.{field} is not a setting.{did_you_mean(field, allowed)} "
                f"Allowed: {', '.join(allowed)}."
            )
    if missing := [f"config.augment.{field}" for field in allowed if field not in settings]:
        raise UserError(
            f"{', '.join(missing)} must be set; every preset in data/presets.py has all fields."
        )


def _check_crop(settings: _ViewSettings) -> None:
    size, scale, ratio = (settings[field] for field in ("size", "scale", "ratio"))
    whole = isinstance(size, numbers.Integral) and not isinstance(size, bool)
    _require(whole and size >= 1, settings, "size", "a whole number of pixels, 1 or more")
    shares = "two fractions of the image area, 0 < lowest <= highest <= 1"
    _require(_are_numbers(scale, 2) and 0 < scale[0] <= scale[1] <= 1, settings, "scale", shares)
    ratios = "two ratios width / height, 0 < lowest <= highest"
    _require(_are_numbers(ratio, 2) and 0 < ratio[0] <= ratio[1], settings, "ratio", ratios)
    if settings["interpolation"] not in INTERPOLATIONS:
        raise unknown("config.augment.interpolation", settings["interpolation"], INTERPOLATIONS)
    if settings["antialias"] not in ANTIALIAS:
        raise unknown("config.augment.antialias", settings["antialias"], ANTIALIAS)


def _check_order(settings: _ViewSettings) -> None:
    order = settings["order"]
    names = f"a tuple of distinct names among {', '.join(OPERATIONS)}"
    _require(isinstance(order, (tuple, list)), settings, "order", names)
    for name in order:
        if name not in tuple(OPERATIONS):  # a name from a config may not be hashable
            raise unknown("config.augment.order", name, OPERATIONS)
    _require(len(set(order)) == len(order), settings, "order", names)


def _check_photometric(settings: _ViewSettings) -> None:
    for name in OPERATIONS:
        value = settings[f"{name}_prob"]
        ok = _are_numbers([value], 1) and 0 <= value <= 1
        _require(ok, settings, f"{name}_prob", "a probability in 0..1")
    jitter, sigma = settings["jitter"], settings["blur_sigma"]
    ok = _are_numbers(jitter, 4) and min(jitter) >= 0 and jitter[3] <= 0.5
    strengths = "four numbers >= 0: brightness, contrast, saturation, and hue <= 0.5 turns"
    _require(ok, settings, "jitter", strengths)
    ok = _are_numbers(sigma, 2) and 0 <= sigma[0] <= sigma[1]
    _require(ok, settings, "blur_sigma", "two widths in pixels, 0 <= lowest <= highest")
    _require(_are_numbers(settings["mean"], 3), settings, "mean", "three numbers")
    ok = _are_numbers(settings["std"], 3) and min(settings["std"]) > 0
    _require(ok, settings, "std", "three numbers above 0")


def _check_unused(settings: _ViewSettings) -> None:
    """Raises UserError for a probability of an operation that `order` lacks."""
    for name in OPERATIONS:
        unused = settings[f"{name}_prob"] > 0 and name not in settings["order"]
        allowed = (
            f"0, as config.augment.order={settings['order']!r} lacks {name!r}, or add it there"
        )
        _require(not unused, settings, f"{name}_prob", allowed)


def _require(ok: bool, settings: _ViewSettings, field: str, allowed: str) -> None:
    if not ok:
        raise UserError(f"{settings.name(field)}={settings[field]!r} is invalid; use {allowed}.")


def _are_numbers(values: Any, count: int) -> bool:
    """Returns whether `values` is a tuple or list of `count` finite numbers."""
    return (
        isinstance(values, (tuple, list))
        and len(values) == count
        and all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in values)
        and all(math.isfinite(v) for v in values)
    )
