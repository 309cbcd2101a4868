"""A recipe: crops drawn on the host, photometric operations named for the step."""

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

# What `order` may name. The place in this table is also the column of the draw that decides
# whether the operation acts, so a recipe that leaves one out draws the same for the others.
OPERATIONS: dict[str, Callable[..., Array]] = {
    "flip": ops.flip,
    "jitter": ops.jitter,
    "grey": ops.grayscale,
    "blur": ops.gaussian_blur,
    "solarize": ops.solarize,
}
# Settings that may be given for each global view, as DINO's and ReSSL's two differ in them.
PER_VIEW = ("jitter_prob", "grey_prob", "blur_prob", "solarize_prob")
# So many views of one size and the same operations are made in a loop, which is compiled once.
LOOPED = 3
INTERPOLATIONS = ("bilinear", "bicubic")
ANTIALIAS = ("exact", "area", "none")


@dataclasses.dataclass(frozen=True)
class Crop:
    """What the host draws for one view: torchvision's RandomResizedCrop.

    Attributes:
      size: height and width of the result, in pixels.
      scale: (lowest, highest) share of the image's area that a crop covers.
      ratio: (lowest, highest) width over height of a crop.
      interpolation: "bilinear" or "bicubic".
      antialias: "exact", "area" or "none": what shrinking averages over, see `decode.resize`.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: str
    antialias: str


@dataclasses.dataclass(frozen=True)
class Photometric:
    """What the step does to the bytes of one view; distributions as in torchvision.

    An operation of probability 0, or jitter of no strength, is left out of the compiled step.

    Attributes:
      order: names in `OPERATIONS`, in the order in which they act.
      flip_prob: probability of a left-right flip.
      jitter: strengths x of brightness, contrast and saturation, factors ~ U(max(0, 1-x), 1+x),
        then h <= 0.5 of hue, shift ~ U(-h, h) turns.
      jitter_prob: probability of the four together.
      grey_prob: probability of a grey image.
      blur_prob: probability of a Gaussian blur.
      blur_sigma: (lo, hi) in pixels, sigma ~ U(lo, hi).
      solarize_prob: probability of inverting the upper half of the values.
      mean: of the three channels, subtracted at the end.
      std: of the three channels, divided by at the end.
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
        """Augmented and normalised images.

        Args:
          images: u8[B, H, W, 3].
          key: of this view and step, equal on every replica.
          positions: i32[B], where each image stands in the global batch.

        Returns:
          f32[B, H, W, 3], normalised by `mean` and `std`.

        Raises:
          AssertionError: while tracing, when a shape or dtype above does not hold.
        """
        draws = self.draw(key, positions)
        images = _unit(images)
        if {"blur", "flip"} <= draws.keys():
            # Mirroring can come at any place, and the blur's matrix does it for nothing.
            draws["blur"] += draws.pop("flip")
        for name in filter(draws.__contains__, self.active):
            images = OPERATIONS[name](images, *draws[name])
        return ops.normalize(images, self.mean, self.std)

    @property
    def active(self) -> tuple[str, ...]:
        """The operations that can change an image, in the order in which they act."""
        strength = {**dict.fromkeys(OPERATIONS, 1.0), "jitter": max(self.jitter)}
        return tuple(n for n in self.order if self.probability(n) > 0 and strength[n] > 0)

    def probability(self, name: str) -> float:
        """The probability in [0, 1] of the operation `name`."""
        return getattr(self, f"{name}_prob")

    def draw(self, key: Array, positions: Array) -> dict[str, tuple[Array, ...]]:
        """The random arguments of every active operation, after its images.

        An image's draws depend on the key and on its place in the global batch alone, so they are
        the same on any number of devices.

        Args:
          key: of this view and step, equal on every replica.
          positions: i32[B], where each image stands in the global batch.

        Returns:
          {"flip": (bool[B],), "jitter": (f32[B, 4], i32[4]), "grey": (bool[B],),
          "blur": (f32[B],), "solarize": (bool[B],)}, less what is not active. Images that escape
          jitter have factors (1, 1, 1, 0), and those that escape blur have sigma 0.

        Raises:
          AssertionError: while tracing, when a shape or dtype above does not hold.
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
            # torchvision draws an order for every image. Here the batch shares one, from the key
            # alone: with an order an image, each of the four positions would compute all four
            # operations for everyone and keep one. Replicas agree on it because their keys do.
            order = jax.random.permutation(order_key, jnp.arange(4, dtype=jnp.int32))
            draws["jitter"] = (self._factors(masks["jitter"], amount[:, :4]), order)
        return draws

    def _sigma(self, mask: Array, amount: Array) -> Array:
        """f32[B]: widths of the blur, 0 where the mask is off."""
        low, high = self.blur_sigma
        return jnp.where(mask, low + (high - low) * amount, 0.0)

    def _factors(self, mask: Array, amount: Array) -> Array:
        """f32[B, 4]: jitter factors, those that change nothing where the mask is off."""
        *strengths, turns = self.jitter
        low = jnp.asarray([[*(max(0.0, 1.0 - x) for x in strengths), -turns]], jnp.float32)
        high = jnp.asarray([[*(1.0 + x for x in strengths), turns]], jnp.float32)
        neutral = jnp.asarray([[1.0, 1.0, 1.0, 0.0]], jnp.float32)
        return jnp.where(mask[:, None], low + (high - low) * amount, neutral)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the views of an image are made, global views first.

    Attributes:
      crops: what the host draws, one entry a view.
      photometric_ops: what the step does afterwards, one entry a view.
    """

    crops: tuple[Crop, ...]
    photometric_ops: tuple[Photometric, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Height and width of every view, in pixels."""
        return tuple(crop.size for crop in self.crops)

    def photometric(
        self, views: Mapping[int, Array], key: Array, positions: Array
    ) -> dict[int, Array]:
        """Augmented and normalised views; each draws for itself.

        Args:
          views: {v: u8[B, H, W, 3]}, view numbers of this recipe.
          key: of this step, equal on every replica.
          positions: i32[B], where each image stands in the global batch.

        Returns:
          {v: f32[B, H, W, 3]}, normalised.

        Raises:
          AssertionError: while tracing, when a shape or dtype above does not hold.
        """
        made = {}
        for group in self._alike(views):
            operations = self.photometric_ops[group[0]]
            keys = [jax.random.fold_in(key, view) for view in group]
            if len(group) < LOOPED:
                for view, own in zip(group, keys, strict=True):
                    made[view] = operations(views[view], own, positions)
                continue
            stacked = jnp.stack([views[view] for view in group])
            out = jax.lax.map(
                lambda pair, run=operations: run(pair[1], pair[0], positions),
                (jnp.stack(keys), stacked),
            )
            made.update(zip(group, out, strict=True))
        return {view: made[view] for view in views}

    def _alike(self, views: Mapping[int, Array]) -> list[list[int]]:
        """View numbers, those of one size and the same operations together."""
        groups: dict[Any, list[int]] = {}
        for view, images in views.items():
            groups.setdefault((images.shape, self.photometric_ops[view]), []).append(view)
        return list(groups.values())

    def plain(self, images: Array) -> Array:
        """Normalised images and nothing else, as evaluation sees them.

        Args:
          images: u8[B, H, W, 3].

        Returns:
          f32[B, H, W, 3], normalised by the mean and std of view 0.

        Raises:
          AssertionError: while tracing, when a shape or dtype above does not hold.
        """
        first = self.photometric_ops[0]
        return ops.normalize(_unit(images), first.mean, first.std)


def pixel_scale_ratio(
    large: Crop, small: Crop, height: int = 375, width: int = 500, draws: int = 20_000
) -> float:
    """How much finer, on average, a local view's pixels are than a global view's.

    SSLight (arXiv:2210.02808) eq. 1: the pixel scale of a view is its final area over the area it
    covers of the image; the ratio is the mean of PS_global / PS_local over pairs of crops. From
    crops drawn as the pipeline draws them, always the same ones.

    Args:
      large: of the global view.
      small: of the local view.
      height: of the image in px; the default is ImageNet's most frequent size.
      width: likewise.
      draws: crops of each kind.
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
    """The recipe of `count` global views with the settings `augment`, and of local views.

    Args:
      augment: a mapping or ConfigDict with the fields of a stack in `stacks.py`, all of them.
        `blur_prob` and `solarize_prob` may be tuples with a number for each global view.
      count: how many global views, at least 1.
      local: the fields of `stacks.LOCALS`: how many further, smaller views, and in what their
        settings differ; None: there are none.

    Raises:
      UserError: a field is missing, unknown or out of its range; named as config.augment.FIELD
        or config.local.FIELD.
    """
    assert count >= 1, count
    settings = _Given({name: augment[name] for name in augment})
    _check_fields(settings)
    views = [_of_view(settings, view, count) for view in range(count)]
    further = 0 if local is None else local["count"]
    if not isinstance(further, numbers.Integral) or int(further) < 0:
        raise UserError(f"config.local.count={further!r} will not do; use 0 or more views.")
    if local is not None and further:
        changes = {name: local[name] for name in local if name != "count"}
        views += [_Given({**settings, **changes}, changes.keys())] * further
    for view in views:
        for check in (_check_crop, _check_order, _check_photometric, _check_effects):
            check(view)
    return Recipe(
        tuple(_make(Crop, view) for view in views),
        tuple(_make(Photometric, view) for view in views),
    )


class _Given(dict):
    """Settings of a view, and where each was given."""

    def __init__(self, values: Mapping[str, Any], local: Iterable[str] = ()):
        super().__init__(values)
        self._local = frozenset(local)

    def name(self, field: str) -> str:
        return f"config.{'local' if field in self._local else 'augment'}.{field}"


def _of_view(settings: _Given, view: int, count: int) -> _Given:
    """The settings of one global view, where some are given for each."""
    made = _Given(settings)
    for field in PER_VIEW:
        if isinstance(settings[field], (tuple, list)):
            each = f"a probability in 0..1, or {count} of them, one for each global view"
            _require(len(settings[field]) == count, settings, field, each)
            made[field] = settings[field][view]
    return made


def _make(cls: type, settings: Mapping[str, Any]) -> Any:
    values = {name: settings[name] for name in _names(cls)}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _unit(images: Array) -> Array:
    """u8[B, H, W, 3] -> f32[B, H, W, 3] in [0, 1]."""
    chex.assert_type(images, jnp.uint8)
    # A channel at a time, as the operations that follow read them.
    planes = (images[..., channel].astype(jnp.float32) / 255.0 for channel in range(3))
    return jnp.stack(tuple(planes), axis=-1)


def _uniforms(key: Array, positions: Array) -> tuple[Array, Array]:
    """f32[B, 5] and f32[B, 5] in [0, 1): a chance an operation; four jitter amounts and a sigma."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)
    draws = jax.vmap(lambda k: jax.random.uniform(k, (len(OPERATIONS) + 5,)))(keys)
    return draws[:, : len(OPERATIONS)], draws[:, len(OPERATIONS) :]


def _names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _check_fields(settings: Mapping[str, Any]) -> None:
    fields = _names(Crop) + _names(Photometric)
    for given in settings:
        if given not in fields:
            raise UserError(
                f"config.augment.{given} is not a setting.{did_you_mean(given, fields)} "
                f"Allowed: {', '.join(fields)}."
            )
    if missing := [f"config.augment.{field}" for field in fields if field not in settings]:
        raise UserError(
            f"{', '.join(missing)} must be set; every stack in data/stacks.py has all fields."
        )


def _check_crop(settings: _Given) -> None:
    size, scale, ratio = (settings[field] for field in ("size", "scale", "ratio"))
    whole = isinstance(size, numbers.Integral) and not isinstance(size, bool)
    _require(whole and size >= 1, settings, "size", "a whole number of pixels, 1 or more")
    shares = "two shares of the image's area, 0 < lowest <= highest <= 1"
    _require(_are_numbers(scale, 2) and 0 < scale[0] <= scale[1] <= 1, settings, "scale", shares)
    ratios = "two quotients of width and height, 0 < lowest <= highest"
    _require(_are_numbers(ratio, 2) and 0 < ratio[0] <= ratio[1], settings, "ratio", ratios)
    if settings["interpolation"] not in INTERPOLATIONS:
        raise unknown("config.augment.interpolation", settings["interpolation"], INTERPOLATIONS)
    if settings["antialias"] not in ANTIALIAS:
        raise unknown("config.augment.antialias", settings["antialias"], ANTIALIAS)


def _check_order(settings: _Given) -> None:
    order = settings["order"]
    names = f"a tuple of names, each once, among {', '.join(OPERATIONS)}"
    _require(isinstance(order, (tuple, list)), settings, "order", names)
    for name in order:
        if name not in tuple(OPERATIONS):  # compares, as a name from a config may not hash
            raise unknown("config.augment.order", name, OPERATIONS)
    _require(len(set(order)) == len(order), settings, "order", names)


def _check_photometric(settings: _Given) -> None:
    for name in OPERATIONS:
        value = settings[f"{name}_prob"]
        ok = _are_numbers([value], 1) and 0 <= value <= 1
        _require(ok, settings, f"{name}_prob", "a probability in 0..1")
    jitter, sigma = settings["jitter"], settings["blur_sigma"]
    ok = _are_numbers(jitter, 4) and min(jitter) >= 0 and jitter[3] <= 0.5
    strengths = "brightness, contrast, saturation, hue: four numbers from 0 up, hue to 0.5 turns"
    _require(ok, settings, "jitter", strengths)
    ok = _are_numbers(sigma, 2) and 0 <= sigma[0] <= sigma[1]
    _require(ok, settings, "blur_sigma", "two widths in pixels, 0 <= lowest <= highest")
    _require(_are_numbers(settings["mean"], 3), settings, "mean", "three numbers")
    ok = _are_numbers(settings["std"], 3) and min(settings["std"]) > 0
    _require(ok, settings, "std", "three numbers above 0")


def _check_effects(settings: _Given) -> None:
    """Refuses a probability that nothing would read."""
    for name in OPERATIONS:
        idle = settings[f"{name}_prob"] > 0 and name not in settings["order"]
        where = f"0, as config.augment.order={settings['order']!r} lacks {name!r}, or add it there"
        _require(not idle, settings, f"{name}_prob", where)


def _require(ok: bool, settings: _Given, field: str, allowed: str) -> None:
    if not ok:
        raise UserError(f"{settings.name(field)}={settings[field]!r} will not do; use {allowed}.")


def _are_numbers(values: Any, count: int) -> bool:
    """Whether `values` is a tuple or list of `count` finite numbers."""
    return (
        isinstance(values, (tuple, list))
        and len(values) == count
        and all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in values)
        and all(math.isfinite(v) for v in values)
    )
