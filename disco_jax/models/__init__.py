"""Networks by name. A family is a module whose `VARIANTS` table ends its file."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from disco_jax import errors
from disco_jax.models import heads
from disco_jax.models.backbones import efficientnet, mobilenet, resnet, vit, xcit
from disco_jax.models.encoder import Encoder, Network, rescaling
from disco_jax.models.layers.norm import MODES
from disco_jax.ops.collectives import EXCHANGES

FAMILIES: dict[type[nn.Module], dict[str, dict[str, Any]]] = {
    resnet.ResNet: resnet.VARIANTS,
    efficientnet.EfficientNet: efficientnet.VARIANTS,
    mobilenet.MobileNet: mobilenet.VARIANTS,
    vit.ViT: vit.VARIANTS,
    xcit.XCiT: xcit.VARIANTS,
}
BACKBONES = {name: (cls, spec) for cls, table in FAMILIES.items() for name, spec in table.items()}
HEADS = (*heads.VARIANTS, "regression", "none")
_MOST_LAYERS = 20  # of a head
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Fields of a spec that only some families have, and the value that leaves them as they are.
_OPTIONAL = {
    "width": 0,
    "stem": "",
    "zero_init_residual": False,
    "grid": 0,
    "patch": 0,
    "drop_path": 0.0,
}


def compute_dtype(name: str) -> Any:
    """The dtype of a config's `dtype`; "auto" is bfloat16 on accelerators, float32 on CPUs."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise errors.unknown("config.dtype", name, ["auto", *DTYPES])
    return DTYPES[name]


def exchange(name: str) -> str:
    """How "shuffle" moves images by a config's `fast.exchange`; "auto": all_to_all on TPUs."""
    if name == "auto":
        return "all_to_all" if jax.default_backend() == "tpu" else "gather"
    if name not in EXCHANGES:
        raise errors.unknown("config.fast.exchange", name, ["auto", *EXCHANGES])
    return name


def build_encoder(spec: Any, dtype: str = "float32", setting: str = "config.student") -> Encoder:
    """The encoder that a network's part of a config describes.

    Args:
      spec: fields backbone, head, hidden, layers (0: the head's own), dim, prototypes, adapter,
        norm_group; and width (0: the variant's own), stem ("": the variant's own),
        zero_init_residual and grid (0: the variant's own), patch (likewise) and drop_path, which
        only some families take.
      dtype: "float32", "bfloat16" or "auto".
      setting: where the fields stand in the config, for messages.

    Raises:
      UserError: a name that is not known or a width that cannot be.
    """
    if spec.backbone not in BACKBONES:
        raise errors.unknown(f"{setting}.backbone", spec.backbone, BACKBONES)
    if spec.stem not in ("", *resnet.STEMS):
        raise errors.unknown(f"{setting}.stem", spec.stem, resnet.STEMS)
    if spec.head not in HEADS:
        raise errors.unknown(f"{setting}.head", spec.head, HEADS)
    least = dict(width=0, hidden=-1, layers=0, dim=1, norm_group=0, adapter=0, grid=0, patch=0)
    for field, low in least.items():
        if spec.get(field, low) < low:
            raise errors.UserError(f"{setting}.{field}={spec[field]} is below {low}.")
    _check_layers(spec, setting)
    cls, fields = BACKBONES[spec.backbone]
    fields = {**fields, **_optional(cls, spec, setting), "norm_group": spec.norm_group}
    precision = compute_dtype(dtype)
    return Encoder(
        cls(**fields, dtype=precision),
        _head(spec, precision),
        heads.Adapter(spec.adapter, dtype=precision) if spec.adapter else None,
        _prototypes(spec, setting),
    )


def taken(name: str, setting: str, backend: str) -> bool:
    """Whether a choice that pays on one kind of device is taken: "on", "off" or "auto".

    Args:
      name: the choice; "auto" asks where we are.
      setting: where it stands in the config, for messages.
      backend: where it pays, "tpu" or "cpu".
    """
    if name not in ("auto", "on", "off"):
        raise errors.unknown(setting, name, ["auto", "on", "off"])
    return name == "on" or (name == "auto" and jax.default_backend() == backend)


def packed_columns(encoder: Encoder) -> Encoder:
    """`encoder` with columns side by side in early layers, as many as its family packs."""
    return _with(encoder, columns=getattr(encoder.backbone, "packing", 1))


def by_product(encoder: Encoder) -> Encoder:
    """`encoder` with `BatchNorm.by_product`, where its family has that."""
    return _with(encoder, by_product=True)


def by_shifts(encoder: Encoder, config: Any) -> Encoder:
    """`encoder` with `shifts.by_shifts`, where its family has that and `config.fast` takes it.

    Args:
      encoder: of any family.
      config: of a pretraining; those of earlier versions have no such field.
    """
    choice = config.get("fast", {}).get("shifts", "auto")
    return _with(encoder, shifts=taken(choice, "config.fast.shifts", "cpu"))


def plain_stem(encoder: Encoder) -> Encoder:
    """`encoder` without `space_to_depth.by_pairs`, where its family has that."""
    return _with(encoder, pairs=False)


def plain(encoder: Encoder) -> Encoder:
    """`encoder` whose layers are XLA's own, one by one."""
    return _with(encoder, pairs=False, columns=1, by_product=False, shifts=False)


def _with(encoder: Encoder, **fields: Any) -> Encoder:
    """`encoder`, its backbone with those of `fields` that its family has."""
    known = {name: value for name, value in fields.items() if hasattr(encoder.backbone, name)}
    return encoder.clone(backbone=encoder.backbone.clone(**known)) if known else encoder


def backbone(name: str) -> Encoder:
    """A backbone of `BACKBONES` in float32 without a head."""
    cls, fields = BACKBONES[name]
    return Encoder(cls(**fields), heads.Identity())


def build_network(
    spec: Any, norm: str, dtype: str, setting: str, normalisation: tuple[Any, Any] | None = None
) -> Network:
    """`build_encoder` with the BatchNorm mode `norm` that it trains in.

    Args:
      spec, dtype, setting: see `build_encoder`; `spec.mean` and `spec.std`, if there are any,
        are what the network's images are normalised by.
      norm: a name in `norm.MODES`.
      normalisation: mean and standard deviation that the recipe normalises by.
    """
    if norm not in MODES:
        raise errors.unknown(f"{setting}.norm", norm, MODES)
    rescale, own = None, [tuple(spec.get(name, ())) for name in ("mean", "std")]
    if normalisation and any(own):
        if [len(values) for values in own] != [3, 3] or min(own[1]) <= 0:
            raise errors.UserError(
                f"{setting}.mean={own[0]} and {setting}.std={own[1]} must be three numbers each, "
                "those of std above 0, or both () to take the recipe's."
            )
        rescale = rescaling((own[0], own[1]), normalisation)
    return Network(build_encoder(spec, dtype, setting), norm, rescale)


def width(spec: Any) -> int:
    """How many features the backbone of a network's part of a config has."""
    if spec.backbone not in BACKBONES:
        raise errors.unknown("The backbone", spec.backbone, BACKBONES)
    cls, variant = BACKBONES[spec.backbone]
    known = {field.name for field in dataclasses.fields(cls)}
    given = {n: spec[n] for n, off in _OPTIONAL.items() if spec[n] != off and n in known}
    return cls(**{**variant, **given}).out_features


def parameters(encoder: Encoder, parts: Iterable[str] = ("backbone",), size: int = 224) -> int:
    """Numbers that are learned in parts of an encoder; by default as the papers count a network.

    DisCo's and RETRO's tables give them in units of 2^20, "M".

    Args:
      encoder: the network.
      parts: of "backbone", "adapter", "head", "prototypes"; those that are absent count nothing.
      size: of the images, px; does not change the count.
    """
    params = jax.eval_shape(lambda: encoder.create(0, size))["params"]
    return sum(x.size for part in parts for x in jax.tree.leaves(params.get(part, {})))


def _optional(cls: type[nn.Module], spec: Any, setting: str) -> dict[str, Any]:
    """The fields of `_OPTIONAL` that are set; a stem counts only where the family has one."""
    known = {field.name for field in dataclasses.fields(cls)}
    given = {n: spec[n] for n, off in _OPTIONAL.items() if spec.get(n, off) != off}
    for name in given.keys() - known - {"stem"}:
        raise errors.UserError(
            f"{setting}.{name}={spec[name]!r}: {spec.backbone} has no such option; leave it at "
            f"{_OPTIONAL[name]!r}."
        )
    if spec.stem == "small" and "stem" not in known:
        raise errors.UserError(
            f"{setting}.stem='small': {spec.backbone} cuts images into patches and has no stem "
            "for small ones; take a convolutional backbone or larger images."
        )
    return {name: value for name, value in given.items() if name in known}


def _check_layers(spec: Any, setting: str) -> None:
    """Refuses a number of linear layers that the head does not have."""
    layers = spec.get("layers", 0)
    if layers and (spec.head not in heads.VARIANTS or not spec.hidden):
        raise errors.UserError(
            f"{setting}.layers={layers}: the head {spec.head!r} with hidden={spec.hidden} has no "
            "layers to choose; leave it at 0."
        )
    if layers > _MOST_LAYERS:
        raise errors.UserError(f"{setting}.layers={layers} is above {_MOST_LAYERS}.")


def _head(spec: Any, dtype: Any) -> nn.Module:
    if spec.head == "none":
        return heads.Identity()
    if spec.head == "regression":
        return heads.RegressionHead(spec.dim, spec.norm_group, dtype)
    fields = heads.VARIANTS[spec.head]
    if layers := spec.get("layers", 0):  # runs of earlier versions have no such field
        fields = {**fields, "layers": layers}
    return heads.ProjectionHead(
        spec.hidden, spec.dim, **fields, norm_group=spec.norm_group, dtype=dtype
    )


def _prototypes(spec: Any, setting: str) -> heads.Prototypes | None:
    if not spec.prototypes:
        return None
    if min(spec.prototypes) < 1:
        raise errors.UserError(f"{setting}.prototypes={spec.prototypes} has a head without any.")
    return heads.Prototypes(tuple(spec.prototypes), weight_norm=spec.head.startswith("dino"))
