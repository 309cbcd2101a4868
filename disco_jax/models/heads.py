"""Heads on top of the pooled features; thrown away when the backbone is deployed."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.models.backbones.inverted import ACTIVATIONS
from disco_jax.models.layers.initializers import (
    narrow,
    narrower,
    ones,
    torch_bias,
    torch_kernel,
    unit_columns,
    zeros,
)
from disco_jax.models.layers.norm import BatchNorm
from disco_jax.ops.losses import unit


class ProjectionHead(nn.Module):
    """Linear layers with an activation between them; its width is DisCo's lever.

    MoCo-v2 (arXiv:2003.04297): linear - ReLU - linear. SwAV (arXiv:2006.09882) has BatchNorm in
    between and ends on the unit sphere; DINO (arXiv:2104.14294) has three layers and GELU; SimSiam
    (arXiv:2011.10566) has BatchNorm after every layer, the last of three as well.

    Attributes:
      hidden: width of the hidden layers; 0 leaves a single linear layer, -1 takes the features'
        width (DisCo*, SEED).
      dim: of the embedding.
      layers: linear layers.
      batch_norm: BatchNorm before each activation.
      out_norm: and after the last layer.
      activation: "relu" or "gelu".
      unit: the embedding has length 1.
      start: "torch": U(+-1/sqrt(fan_in)); "narrow": deviation 0.02, biases 0; "narrower": 0.01.
      norm_group: see `BatchNorm.group`.
      dtype: of the computation; the embedding is float32.
    """

    hidden: int = 2048
    dim: int = 128
    layers: int = 2
    batch_norm: bool = False
    out_norm: bool = False
    activation: str = "relu"
    unit: bool = False
    start: str = "torch"
    norm_group: int = 0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Array, *, norm: str, hidden: bool = False) -> Array:
        """float[B, F] -> f32[B, dim], not normalised unless `unit`.

        With `hidden`: what its last layer reads instead, f32[B, width].
        """
        x = features
        width = features.shape[-1] if self.hidden < 0 else self.hidden
        for i in range(1, self.layers if self.hidden else 1):
            name = "hidden" if i == 1 else f"hidden{i}"
            x = self._linear(x, width, name)
            if self.batch_norm:
                x = BatchNorm(self.norm_group, dtype=self.dtype, name=f"{name}_bn")(x, norm=norm)
            x = ACTIVATIONS[self.activation](x)
        if hidden:
            return x.astype(jnp.float32)
        x = self._linear(x, self.dim, "out")
        if self.out_norm:
            x = BatchNorm(self.norm_group, dtype=self.dtype, name="out_bn")(x, norm=norm)
        x = x.astype(jnp.float32)
        return unit(x) if self.unit else x

    def _linear(self, x: Array, width: int, name: str) -> Array:
        return _linear(width, x.shape[-1], self.start, self.dtype, name)(x)


class RegressionHead(nn.Module):
    """SimReg's predictor (arXiv:2201.05131): two MLPs in a row, twice as wide inside.

    Attributes:
      dim: of the embedding: that of the teacher's features.
      norm_group: see `BatchNorm.group`.
      dtype: of the computation; the embedding is float32.
    """

    dim: int
    norm_group: int = 0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Array, *, norm: str) -> Array:
        """float[B, F] -> f32[B, dim], not normalised."""
        x, width = features, features.shape[-1]
        for i, dim in ((1, width), (2, self.dim)):
            x = _linear(2 * width, x.shape[-1], "torch", self.dtype, f"hidden{i}")(x)
            x = BatchNorm(self.norm_group, dtype=self.dtype, name=f"hidden{i}_bn")(x, norm=norm)
            x = _linear(dim, 2 * width, "torch", self.dtype, f"out{i}")(nn.relu(x))
        return x.astype(jnp.float32)


class Identity(nn.Module):
    """No head: the embedding is the features."""

    def __call__(self, features: Array, *, norm: str) -> Array:
        """float[B, F] -> f32[B, F]."""
        del norm
        return features.astype(jnp.float32)


class Adapter(nn.Module):
    """RETRO's adapter: one linear layer from the features to what the teacher's head reads.

    That it has a bias and no activation is not settled by the paper (disagreement R8).

    Attributes:
      width: of the teacher's features.
      bias: whether it has one.
      activation: "" or a key of `ACTIVATIONS`.
      dtype: of the computation.
    """

    width: int
    bias: bool = True
    activation: str = ""
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """float[B, F] -> float[B, width]."""
        layer = _linear(self.width, features.shape[-1], "torch", self.dtype, "linear", self.bias)
        x = layer(features)
        return ACTIVATIONS[self.activation](x) if self.activation else x


class Prototypes(nn.Module):
    """Similarities of an embedding to learned prototypes: SwAV's, or DINO's last layer.

    Attributes:
      counts: prototypes of each head; DeepCluster-v2 has three heads of 3000.
      weight_norm: every prototype is scale * kernel / |kernel| (DINO), instead of kernel (SwAV),
        which starts at length 1; the optimizer keeps it there (`unit_norm` in its config).
    """

    counts: tuple[int, ...]
    weight_norm: bool = False

    @nn.compact
    def __call__(self, embedding: Array) -> Array:
        """f32[B, D] -> f32[B, sum(counts)], the heads side by side."""
        scores = [self._scores(embedding, i, count) for i, count in enumerate(self.counts)]
        return jnp.concatenate(scores, axis=-1)

    def _scores(self, embedding: Array, index: int, count: int) -> Array:
        shape = (embedding.shape[-1], count)
        start = torch_kernel if self.weight_norm else unit_columns
        kernel = self.param(f"kernel{index}", start, shape, jnp.float32)
        if self.weight_norm:
            scale = self.param(f"scale{index}", ones, (count,), jnp.float32)
            kernel = kernel * (scale / jnp.linalg.norm(kernel, axis=0))[None]
        return jnp.dot(embedding, kernel, precision=jax.lax.Precision.HIGHEST)


def _linear(
    width: int, fan_in: int, start: str, dtype: jnp.dtype, name: str, bias: bool = True
) -> nn.Dense:
    kernel, first = {
        "torch": (torch_kernel, torch_bias(fan_in)),
        "narrow": (narrow, zeros),
        "narrower": (narrower, zeros),
    }[start]
    return nn.Dense(
        width, use_bias=bias, kernel_init=kernel, bias_init=first, dtype=dtype, name=name
    )


# Fields of `ProjectionHead` by the name that a config gives.
VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "mlp_bn": dict(batch_norm=True),
    "mlp_bn_all": dict(batch_norm=True, out_norm=True),  # SimSiam's, MoCo-v3's
    "mlp_unit": dict(unit=True),
    "mlp_narrow": dict(start="narrow"),  # SSLight's for MoCo-v2*
    "swav": dict(batch_norm=True, unit=True),  # also SimCLR's
    "swav_narrow": dict(batch_norm=True, unit=True, start="narrower"),  # SSLight's for SwAV
    "dino": dict(layers=3, activation="gelu", unit=True, start="narrow"),
    "dino_bn": dict(layers=3, activation="gelu", unit=True, start="narrow", batch_norm=True),
}
