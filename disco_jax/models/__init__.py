"""Networks by name: backbones, heads, and the encoders that a config describes."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax

from disco_jax import errors
from disco_jax.models import heads
from disco_jax.models.backbones import BACKBONES, find
from disco_jax.models.backbones.backbone import STEMS, Backbone
from disco_jax.models.encoder import Encoder, Network, rescaling
from disco_jax.models.layers.compute import Compute
from disco_jax.models.layers.norm import MODES
from disco_jax.models.layers.settings import (
    DTYPES,
    PLAIN,
    compute_dtype,
    resolve_auto,
    resolve_config,
)

__all__ = [
    "BACKBONES", "DTYPES", "HEADS", "PLAIN", "Backbone", "Compute", "Encoder", "Network",
    "backbone", "build_encoder", "build_network", "compute_dtype", "find", "is_transformer",
    "options", "parameters", "resolve_auto", "resolve_config", "width",
]  # fmt: skip

HEADS = (*heads.VARIANTS, "regression", "none")
_MAX_HEAD_LAYERS = 20
_FLOAT32 = Compute()
# Fields of a spec that only some families have, and the value that keeps the variant's own.
_OPTIONAL = {
    "width": 0,
    "stem": "",
    "zero_init_residual": False,
    "grid": 0,
    "patch": 0,
    "drop_path": 0.0,
}


def build_encoder(
    spec: Any, compute: Compute = _FLOAT32, setting: str = "config.student"
) -> Encoder:
    """Returns the encoder that a network's section of a config describes.

    Args:
      spec: fields backbone, head, hidden, layers (0: the head's default), dim, prototypes, adapter,
        norm_group; and the fields of some families: width, grid, patch (0: the variant's), stem
        ("": the variant's), zero_init_residual and drop_path.
      compute: how layers are computed; its `norm_group` is taken from `spec`.
      setting: name of the section, for messages.

    Raises:
      UserError: a name is unknown or a number is out of range.
    """
    cls, fields = find(spec.backbone, f"{setting}.backbone")
    if spec.stem not in ("", *STEMS):
        raise errors.unknown(f"{setting}.stem", spec.stem, STEMS)
    if spec.head not in HEADS:
        raise errors.unknown(f"{setting}.head", spec.head, HEADS)
    minima = dict(width=0, hidden=-1, layers=0, dim=1, norm_group=0, adapter=0, grid=0, patch=0)
    for field, minimum in minima.items():
        if spec.get(field, minimum) < minimum:
            raise errors.UserError(f"{setting}.{field}={spec[field]} is below {minimum}.")
    _check_layers(spec, setting)
    compute = dataclasses.replace(compute, norm_group=spec.norm_group)
    make: Callable[..., Backbone] = cls  # every subclass has a field `compute`
    return Encoder(
        make(**{**fields, **_optional_fields(spec, setting)}, compute=compute),
        _head(spec, compute),
        heads.Adapter(spec.adapter, compute=compute) if spec.adapter else None,
        _prototypes(spec, setting),
    )


def build_network(
    spec: Any,
    norm: str,
    compute: Compute,
    setting: str,
    normalization: tuple[Any, Any] | None = None,
) -> Network:
    """Returns `build_encoder` with its BatchNorm mode while training.

    Args:
      spec, compute, setting: see `build_encoder`. `spec.mean` and `spec.std`, if present, are the
        normalization that the network was trained with.
      norm: a name in `norm.MODES`.
      normalization: mean and standard deviation by which the recipe normalizes images.

    Raises:
      UserError: see `build_encoder`; or the mode or the normalization is not allowed.
    """
    if norm not in MODES:
        raise errors.unknown(f"{setting}.norm", norm, MODES)
    rescale, own = None, [tuple(spec.get(name, ())) for name in ("mean", "std")]
    if normalization and any(own):
        if [len(values) for values in own] != [3, 3] or min(own[1]) <= 0:
            raise errors.UserError(
                f"{setting}.mean={own[0]} and {setting}.std={own[1]} must be three numbers each, "
                "those of std above 0, or both () to take the recipe's."
            )
        rescale = rescaling((own[0], own[1]), normalization)
    encoder = build_encoder(spec, compute, setting)
    return Network(encoder, norm, rescale, exchange=compute.exchange, shuffle_dtype=compute.dtype)


def backbone(name: str) -> Encoder:
    """Returns a backbone, named as in `find`, in float32 without a head."""
    cls, fields = find(name)
    return Encoder(cls(**fields), heads.Identity())


def options(name: str) -> frozenset[str]:
    """Returns the optional fields of a config that a backbone has; none for unknown names."""
    if name not in BACKBONES and ":" not in name:
        return frozenset()
    fields = {field.name for field in dataclasses.fields(find(name)[0])}
    return frozenset(_OPTIONAL.keys() & fields)


def is_transformer(name: str) -> bool:
    """Returns whether a backbone is a transformer; False for unknown names."""
    return (name in BACKBONES or ":" in name) and find(name)[0].is_transformer


def width(spec: Any) -> int:
    """Returns the number of features of the backbone that a network's section describes.

    Raises:
      UserError: the backbone is unknown.
    """
    cls, variant = find(spec.backbone)
    fields = {n: spec[n] for n in options(spec.backbone) if spec[n] != _OPTIONAL[n]}
    return cls(**{**variant, **fields}).out_features


def parameters(encoder: Encoder, parts: Iterable[str] = ("backbone",), size: int = 224) -> int:
    """Counts learned numbers in parts of an encoder; by default as papers count a network.

    DisCo's and RETRO's tables give them in units of 2^20, "M".

    Args:
      encoder: the network.
      parts: names among "backbone", "adapter", "head", "prototypes"; absent parts count 0.
      size: size of the images in px, which does not change the count.
    """
    params = jax.eval_shape(lambda: encoder.create(0, size))["params"]
    return sum(x.size for part in parts for x in jax.tree.leaves(params.get(part, {})))


def _optional_fields(spec: Any, setting: str) -> dict[str, Any]:
    """Returns the fields of `_OPTIONAL` that are set; ignores a stem that the family lacks."""
    supported = options(spec.backbone)
    fields = {n: spec[n] for n, default in _OPTIONAL.items() if spec.get(n, default) != default}
    for name in fields.keys() - supported - {"stem"}:
        raise errors.UserError(
            f"{setting}.{name}={spec[name]!r}: {spec.backbone} has no such option; leave it at "
            f"{_OPTIONAL[name]!r}."
        )
    if spec.stem == "small" and "stem" not in supported:
        raise errors.UserError(
            f"{setting}.stem='small': {spec.backbone} has no stem for small images; choose another "
            "backbone, or larger images and stem=''."
        )
    return {name: value for name, value in fields.items() if name in supported}


def _check_layers(spec: Any, setting: str) -> None:
    """Raises UserError if the head does not have the number of linear layers."""
    layers = spec.get("layers", 0)
    if layers and (spec.head not in heads.VARIANTS or not spec.hidden):
        raise errors.UserError(
            f"{setting}.layers={layers}: the head {spec.head!r} with hidden={spec.hidden} has no "
            "layers to choose; leave it at 0."
        )
    if layers > _MAX_HEAD_LAYERS:
        raise errors.UserError(f"{setting}.layers={layers} is above {_MAX_HEAD_LAYERS}.")


def _head(spec: Any, compute: Compute) -> nn.Module:
    if spec.head == "none":
        return heads.Identity()
    if spec.head == "regression":
        return heads.RegressionHead(spec.dim, compute)
    fields = heads.VARIANTS[spec.head]
    if layers := spec.get("layers", 0):  # configs of earlier versions have no such field
        fields = {**fields, "layers": layers}
    return heads.ProjectionHead(spec.hidden, spec.dim, **fields, compute=compute)


def _prototypes(spec: Any, setting: str) -> heads.Prototypes | None:
    if not spec.prototypes:
        return None
    if min(spec.prototypes) < 1:
        raise errors.UserError(f"{setting}.prototypes={spec.prototypes} has a head without any.")
    weight_norm = spec.head in heads.WEIGHT_NORM
    return heads.Prototypes(tuple(spec.prototypes), weight_norm=weight_norm)
