"""Networks by name. A family is a module whose `VARIANTS` table ends its file."""

from typing import Any

import jax
import jax.numpy as jnp

from disco_jax import errors
from disco_jax.models import resnet
from disco_jax.models.encoder import Encoder, Network
from disco_jax.models.heads import ProjectionHead
from disco_jax.models.norm import MODES

FAMILIES = {resnet.ResNet: resnet.VARIANTS}
BACKBONES = {name: (cls, spec) for cls, table in FAMILIES.items() for name, spec in table.items()}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def compute_dtype(name: str) -> Any:
    """The dtype of a config's `dtype`; "auto" is bfloat16 on accelerators, float32 on CPUs."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise errors.unknown("config.dtype", name, ["auto", *DTYPES])
    return DTYPES[name]


def build_encoder(spec: Any, dtype: str = "float32", setting: str = "config.student") -> Encoder:
    """The encoder that a network's part of a config describes.

    Args:
      spec: fields backbone, width (0: the variant's own), stem ("": the variant's own),
        zero_init_residual, norm_group, hidden, dim.
      dtype: "float32", "bfloat16" or "auto".
      setting: where the fields stand in the config, for messages.

    Raises:
      UserError: a name that is not known or a width that cannot be.
    """
    if spec.backbone not in BACKBONES:
        raise errors.unknown(f"{setting}.backbone", spec.backbone, BACKBONES)
    if spec.stem not in ("", *resnet.STEMS):
        raise errors.unknown(f"{setting}.stem", spec.stem, resnet.STEMS)
    for field, least in (("width", 0), ("hidden", -1), ("dim", 1), ("norm_group", 0)):
        if spec[field] < least:
            raise errors.UserError(f"{setting}.{field}={spec[field]} is below {least}.")
    cls, fields = BACKBONES[spec.backbone]
    fields = dict(fields, zero_init_residual=spec.zero_init_residual, norm_group=spec.norm_group)
    if spec.width:
        fields["width"] = spec.width
    if spec.stem:
        fields["stem"] = spec.stem
    precision = compute_dtype(dtype)
    return Encoder(
        cls(**fields, dtype=precision), ProjectionHead(spec.hidden, spec.dim, dtype=precision)
    )


def build_network(spec: Any, norm: str, dtype: str, setting: str) -> Network:
    """`build_encoder` with the BatchNorm mode `norm` that it trains in."""
    if norm not in MODES:
        raise errors.unknown(f"{setting}.norm", norm, MODES)
    return Network(build_encoder(spec, dtype, setting), norm)
