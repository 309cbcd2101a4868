"""Heads on top of the pooled features, which are discarded when the backbone is deployed."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.models.layers.activations import ACTIVATIONS
from disco_jax.models.layers.compute import Compute
from disco_jax.models.layers.initializers import (
    narrow,
    narrower,
    ones,
    torch_bias,
    torch_kernel,
    unit_columns,
    zeros,
)
from disco_jax.ops.vectors import l2_normalize


class ProjectionHead(nn.Module):
    """Linear layers with activations between them; DisCo varies the hidden width.

    MoCo-v2 (arXiv:2003.04297): linear, ReLU, linear. SwAV (arXiv:2006.09882) adds BatchNorm in
    between and normalizes the embedding to length 1. DINO (arXiv:2104.14294) has three layers and
    GELU. SimSiam (arXiv:2011.10566) has BatchNorm after every layer, also after the last of three.

    Attributes:
      hidden: width of the hidden layers; 0 leaves a single linear layer, -1 takes the width of the
        features (DisCo*, SEED).
      dim: width of the embedding.
      layers: number of linear layers.
      batch_norm: whether BatchNorm precedes each activation.
      out_norm: whether BatchNorm follows the last layer.
      activation: "relu" or "gelu".
      l2_normalized: whether the embedding is normalized to length 1.
      start: initial values: "torch": U(+-1/sqrt(fan_in)); "narrow": standard deviation 0.02, biases
        0; "narrower": 0.01.
      compute: how layers are computed.
    """

    hidden: int = 2048
    dim: int = 128
    layers: int = 2
    batch_norm: bool = False
    out_norm: bool = False
    activation: str = "relu"
    l2_normalized: bool = False
    start: str = "torch"
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, features: Array, *, norm: str, hidden: bool = False) -> Array:
        """Maps features to an embedding.

        Args:
          features: float[B, F].
          norm: mode of BatchNorm.
          hidden: whether to return the input of the last layer instead, f32[B, width].

        Returns:
          f32[B, dim], not normalized unless `l2_normalized`.
        """
        x = features
        width = features.shape[-1] if self.hidden < 0 else self.hidden
        for i in range(1, self.layers if self.hidden else 1):
            name = "hidden" if i == 1 else f"hidden{i}"
            x = self._linear(x, width, name)
            if self.batch_norm:
                x = self.compute.batch_norm(name=f"{name}_bn")(x, norm=norm)
            x = ACTIVATIONS[self.activation](x)
        if hidden:
            return x.astype(jnp.float32)
        x = self._linear(x, self.dim, "out")
        if self.out_norm:
            x = self.compute.batch_norm(name="out_bn")(x, norm=norm)
        x = x.astype(jnp.float32)
        return l2_normalize(x) if self.l2_normalized else x

    def _linear(self, x: Array, width: int, name: str) -> Array:
        return _linear(width, x.shape[-1], self.start, self.compute, name)(x)


class RegressionHead(nn.Module):
    """SimReg's predictor (arXiv:2201.05131): two MLPs in a row, twice as wide inside.

    Attributes:
      dim: width of the embedding, that of the teacher's features.
      compute: how layers are computed.
    """

    l2_normalized: ClassVar[bool] = False
    dim: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, features: Array, *, norm: str) -> Array:
        """Maps float[B, F] to f32[B, dim], not normalized."""
        x, width = features, features.shape[-1]
        for i, dim in ((1, width), (2, self.dim)):
            x = _linear(2 * width, x.shape[-1], "torch", self.compute, f"hidden{i}")(x)
            x = self.compute.batch_norm(name=f"hidden{i}_bn")(x, norm=norm)
            x = _linear(dim, 2 * width, "torch", self.compute, f"out{i}")(nn.relu(x))
        return x.astype(jnp.float32)


class Identity(nn.Module):
    """No head: the embedding is the features."""

    l2_normalized: ClassVar[bool] = False

    def __call__(self, features: Array, *, norm: str) -> Array:
        """Returns float[B, F] as f32[B, F]."""
        del norm
        return features.astype(jnp.float32)


class Adapter(nn.Module):
    """RETRO's adapter: a linear layer from the features to the input of the teacher's head.

    The paper leaves open whether it has a bias or an activation (disagreement R8).

    Attributes:
      width: width of the teacher's features.
      bias: whether the layer has a bias.
      activation: "" or a key of `ACTIVATIONS`.
      compute: how layers are computed.
    """

    width: int
    bias: bool = True
    activation: str = ""
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """Maps float[B, F] to float[B, width]."""
        layer = _linear(self.width, features.shape[-1], "torch", self.compute, "linear", self.bias)
        x = layer(features)
        return ACTIVATIONS[self.activation](x) if self.activation else x


class Prototypes(nn.Module):
    """Similarities of an embedding to learned prototypes: SwAV's, or DINO's last layer.

    Attributes:
      counts: number of prototypes of each head; DeepCluster-v2 has three heads of 3000.
      weight_norm: whether prototypes are scale * kernel / |kernel| (DINO) instead of kernel
        (SwAV). SwAV's start at length 1; the optimizer keeps them there (`unit_norm` in its
        config).
    """

    counts: tuple[int, ...]
    weight_norm: bool = False

    @nn.compact
    def __call__(self, embedding: Array) -> Array:
        """Maps f32[B, D] to scores f32[B, sum(counts)], the heads side by side."""
        scores = [self._scores(embedding, i, count) for i, count in enumerate(self.counts)]
        return jnp.concatenate(scores, axis=-1)

    def _scores(self, embedding: Array, index: int, count: int) -> Array:
        """Computes the scores of one head: f32[B, count]."""
        shape = (embedding.shape[-1], count)
        kernel_init = torch_kernel if self.weight_norm else unit_columns
        kernel = self.param(f"kernel{index}", kernel_init, shape, jnp.float32)
        if self.weight_norm:
            scale = self.param(f"scale{index}", ones, (count,), jnp.float32)
            kernel = kernel * (scale / jnp.linalg.norm(kernel, axis=0))[None]
        return jnp.dot(embedding, kernel, precision=jax.lax.Precision.HIGHEST)


def _linear(
    width: int, fan_in: int, start: str, compute: Compute, name: str, bias: bool = True
) -> nn.Dense:
    """Returns a linear layer; see `ProjectionHead` for `start`."""
    kernel_init, bias_init = {
        "torch": (torch_kernel, torch_bias(fan_in)),
        "narrow": (narrow, zeros),
        "narrower": (narrower, zeros),
    }[start]
    return nn.Dense(
        width,
        use_bias=bias,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=compute.dtype,
        name=name,
    )


_DINO: dict[str, Any] = dict(layers=3, activation="gelu", l2_normalized=True, start="narrow")
# Fields of `ProjectionHead` by the name in configs.
VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "mlp_bn": dict(batch_norm=True),
    "mlp_bn_all": dict(batch_norm=True, out_norm=True),  # SimSiam's, MoCo-v3's
    "mlp_unit": dict(l2_normalized=True),
    "mlp_narrow": dict(start="narrow"),  # SSLight's for MoCo-v2*
    "swav": dict(batch_norm=True, l2_normalized=True),  # also SimCLR's
    # SSLight's for SwAV
    "swav_narrow": dict(batch_norm=True, l2_normalized=True, start="narrower"),
    "dino": _DINO,
    "dino_bn": dict(**_DINO, batch_norm=True),
}
# Heads whose prototypes are weight-normalized; see `Prototypes`.
WEIGHT_NORM = frozenset({"dino", "dino_bn"})
