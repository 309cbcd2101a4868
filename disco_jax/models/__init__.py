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
    AUTO,
    DTYPES,
    PLAIN,
    FastSettings,
    compute_dtype,
    resolve_auto,
)
from disco_jax.models.network_spec import NetworkSpec

__all__ = [
    "AUTO", "BACKBONES", "DTYPES", "HEADS", "PLAIN", "Backbone", "Compute", "Encoder",
    "FastSettings", "Network", "NetworkSpec", "backbone", "build_encoder", "build_network",
    "compute_dtype", "family", "find", "is_transformer", "options", "parameters", "probe_rate",
    "resolve_auto", "width",
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
    spec: NetworkSpec, compute: Compute = _FLOAT32, setting: str = "config.student"
) -> Encoder:
    """Returns the encoder that a network's section of a config describes.

    Args:
      spec: the network. A family may lack the fields width, grid, patch, stem ("": the variant's),
        zero_init_residual and drop_path, which then keep their defaults.
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
    minima = dict(
        width=0, hidden=-1, layers=0, dim=1, norm_group=0, adapter=0, predictor=0, grid=0, patch=0
    )
    for field, minimum in minima.items():
        if (value := getattr(spec, field)) < minimum:
            raise errors.UserError(f"{setting}.{field}={value} is below {minimum}.")
    _check_layers(spec, setting)
    compute = dataclasses.replace(compute, norm_group=spec.norm_group)
    make: Callable[..., Backbone] = cls  # every subclass has a field `compute`
    return Encoder(
        make(**{**fields, **_optional_fields(spec, setting)}, compute=compute),
        _head(spec, compute),
        heads.Adapter(spec.adapter, compute=compute) if spec.adapter else None,
        _prototypes(spec, setting),
        _predictor(spec, compute),
    )


def build_network(
    spec: NetworkSpec,
    norm: str,
    compute: Compute,
    setting: str,
    normalization: tuple[Any, Any] | None = None,
    own: tuple[tuple[float, ...], tuple[float, ...]] = ((), ()),
) -> Network:
    """Returns `build_encoder` with its BatchNorm mode while training.

    Args:
      spec, compute, setting: see `build_encoder`.
      norm: a name in `norm.MODES`.
      normalization: mean and standard deviation by which the recipe normalizes images.
      own: those that the network was trained with; ((), ()): the recipe's.

    Raises:
      UserError: see `build_encoder`; or the mode or the normalization is not allowed.
    """
    if norm not in MODES:
        raise errors.unknown(f"{setting}.norm", norm, MODES)
    rescale = None
    if normalization and any(own):
        if [len(values) for values in own] != [3, 3] or min(own[1]) <= 0:
            raise errors.UserError(
                f"{setting}.mean={own[0]} and {setting}.std={own[1]} must be three numbers each, "
                "those of std above 0, or both () to take the recipe's."
            )
        rescale = rescaling(own, normalization)
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


def family(name: str) -> str:
    """Returns the family of a backbone, the name of its module; "" for unknown names."""
    return find(name)[0].__module__.rpartition(".")[2] if name in BACKBONES or ":" in name else ""


def is_transformer(name: str) -> bool:
    """Returns whether a backbone is a transformer; False for unknown names."""
    return (name in BACKBONES or ":" in name) and find(name)[0].is_transformer


def probe_rate(name: str) -> float:
    """Returns the learning rate of DisCo's, SEED's and RETRO's linear probes of a backbone.

    It is for a batch of 256: 3 for EfficientNets and MobileNets, 30 for other families
    (disagreement D7).

    Raises:
      UserError: the backbone is unknown.
    """
    return find(name)[0].probe_rate


def width(spec: NetworkSpec) -> int:
    """Returns the number of features of the backbone that a network's section describes.

    Raises:
      UserError: the backbone is unknown.
    """
    cls, variant = find(spec.backbone)
    options_set = options(spec.backbone) & _set_options(spec).keys()
    fields = {name: getattr(spec, name) for name in options_set}
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


def _set_options(spec: NetworkSpec) -> dict[str, Any]:
    """Returns the fields of `_OPTIONAL` that differ from the values there."""
    return {n: getattr(spec, n) for n, default in _OPTIONAL.items() if getattr(spec, n) != default}


def _optional_fields(spec: NetworkSpec, setting: str) -> dict[str, Any]:
    """Returns the fields of `_OPTIONAL` that are set; ignores a stem that the family lacks."""
    supported = options(spec.backbone)
    fields = _set_options(spec)
    for name in fields.keys() - supported - {"stem"}:
        raise errors.UserError(
            f"{setting}.{name}={fields[name]!r}: {spec.backbone} has no such option; leave it at "
            f"{_OPTIONAL[name]!r}."
        )
    if spec.stem == "small" and "stem" not in supported:
        raise errors.UserError(
            f"{setting}.stem='small': {spec.backbone} has no stem for small images; choose another "
            "backbone, or larger images and stem=''."
        )
    return {name: value for name, value in fields.items() if name in supported}


def _check_layers(spec: NetworkSpec, setting: str) -> None:
    """Raises UserError if the head does not have the number of linear layers."""
    layers = spec.layers
    if layers and (spec.head not in heads.VARIANTS or not spec.hidden):
        raise errors.UserError(
            f"{setting}.layers={layers}: the head {spec.head!r} with hidden={spec.hidden} has no "
            "layers to choose; leave it at 0."
        )
    if layers > _MAX_HEAD_LAYERS:
        raise errors.UserError(f"{setting}.layers={layers} is above {_MAX_HEAD_LAYERS}.")


def _head(spec: NetworkSpec, compute: Compute) -> nn.Module:
    if spec.head == "none":
        return heads.Identity()
    if spec.head == "regression":
        return heads.RegressionHead(spec.dim, compute)
    fields = heads.VARIANTS[spec.head]
    if spec.layers:
        fields = {**fields, "layers": spec.layers}
    return heads.ProjectionHead(spec.hidden, spec.dim, **fields, compute=compute)


def _predictor(spec: NetworkSpec, compute: Compute) -> heads.ProjectionHead | None:
    if not spec.predictor:
        return None
    dim = width(spec) if spec.head == "none" else spec.dim
    return heads.ProjectionHead(spec.predictor, dim, batch_norm=True, compute=compute)


def _prototypes(spec: NetworkSpec, setting: str) -> heads.Prototypes | None:
    if not spec.prototypes:
        return None
    if min(spec.prototypes) < 1:
        raise errors.UserError(f"{setting}.prototypes={spec.prototypes} has a head without any.")
    weight_norm = spec.head in heads.WEIGHT_NORM
    return heads.Prototypes(spec.prototypes, weight_norm=weight_norm)
