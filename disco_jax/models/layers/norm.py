"""One BatchNorm for every network; the mode is an argument of the call."""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.models.layers.initializers import constant, ones, zeros
from disco_jax.models.layers.packing import pooled, tiled
from disco_jax.ops.collectives import pmean, replicas

# "shuffle" is "local" on images that `encode` traded between replicas first.
MODES = ("local", "sync", "shuffle", "running")
# A map's statistics are those of what it was made of, where that has so many times fewer channels
_WIDER = 2
# and so many times more places than channels, without which the products of pairs cost more.
_PLACES = 16


class Product(NamedTuple):
    """What a 1x1 convolution, whose result is normalised, was made of.

    Attributes:
      rows: float[B, H, W, columns * C], what it read.
      kernel: f32[..., C, F], its weights.
    """

    rows: Array
    kernel: Array

    @classmethod
    def of(cls, layer: nn.Module, rows: Array) -> "Product":
        """Of a convolution of stride 1 that has been called, and the rows it was called with."""
        return cls(rows, layer.variables["params"]["kernel"])

    def pays(self, groups: int) -> bool:
        """Whether its statistics cost less than those of the result; see `BatchNorm.by_product`."""
        channels, features = self.kernel.shape[-2:]
        places = math.prod(self.rows.shape) // (channels * groups)
        return features >= _WIDER * channels and places >= _PLACES * channels


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last (arXiv:1502.03167), as PyTorch counts it.

    norm="local" takes the statistics of groups of `group` images of this replica (0: of all of
    them), "sync" those of the global batch, "running" the stored ones. Outside "running", when
    the collection `batch_stats` is mutable, stored <- momentum * stored + (1 - momentum) * batch,
    with the unbiased variance and, for "local", the mean over the groups. Statistics are float32
    whatever the compute dtype. Without a scale among the parameters the layer before has taken
    the rest in (`folding.still`), and the bias is added. Only "local" with group=0 depends on the
    number of devices.

    Attributes:
      group: images a group in mode "local"; divides the batch of the replica.
      epsilon: added to the variance.
      momentum: the share of the old statistics kept; PyTorch's 0.1 is 0.9 here.
      scale: initial value of the scale; 0 makes a residual branch start as the identity.
      dtype: of the output; None keeps the input's.
      columns: that lie side by side in the channels, see `packing.packed`.
      by_product: statistics of the result y = x W of a 1x1 convolution that has more channels
        than x come from x: E[y] = E[x] W and Var[y] = diag(W' Cov[x] W), which are W's and x's
        alone, so that y is normalised while it is made. Not in mode "sync", whose replicas would
        exchange C^2 numbers for F.
    """

    group: int = 0
    epsilon: float = 1e-5
    momentum: float = 0.9
    scale: float = 1.0
    dtype: jnp.dtype | None = None
    columns: int = 1
    by_product: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        norm: str,
        product: Product | None = None,
        pool: Callable[[Array], Array] | None = None,
    ) -> Array:
        """Normalises x.

        Args:
          x: float[B, ..., columns * C].
          norm: see above.
          product: what x is the result of, for `by_product`.
          pool: a max-pool of what is normalised. It passes any increasing function, so that it
            comes first and only what it leaves is normalised; a channel with a scale below 0
            changes its sign for it. It may pack columns.

        Returns:
          float[B, ..., columns * C], or as `pool` shapes it.
        """
        features = x.shape[-1] // self.columns
        pool = pool or _unchanged
        if self.has_variable("params", "bias") and not self.has_variable("params", "scale"):
            bias = self.param("bias", zeros, (features,), jnp.float32)
            x = pool(x)
            bias = _tiled(bias, x)
            return (x.astype(jnp.float32) + bias).astype(self.dtype or x.dtype)
        scale = self.param("scale", constant(self.scale), (features,), jnp.float32)
        bias = self.param("bias", zeros, (features,), jnp.float32)
        mean = self.variable("batch_stats", "mean", zeros, None, (features,))
        var = self.variable("batch_stats", "var", ones, None, (features,))
        sign: float | Array = 1.0
        if pool is not _unchanged:
            sign = turned = jax.lax.stop_gradient(jnp.where(scale < 0, -1.0, 1.0))
            x, scale = x * _tiled(turned, x).astype(x.dtype), scale * sign
        stored = mean.value * sign
        if norm == "running":
            return self._applied(pool(x), stored, var.value, scale, bias)
        groups = 1 if norm == "sync" or not self.group else x.shape[0] // self.group
        apart = _apart(groups)
        if self.by_product and norm != "sync" and product and product.pays(groups):
            product = product._replace(rows=apart(product.rows))
            batch_mean, batch_var, unbiased = _of_product(product, self.columns)
        else:
            sync = norm == "sync"
            batch_mean, batch_var, unbiased = _statistics(apart(x), stored, sync, self.columns)
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            keep = self.momentum
            mean.value = keep * mean.value + (1 - keep) * jnp.mean(batch_mean, axis=0) * sign
            var.value = keep * var.value + (1 - keep) * jnp.mean(unbiased, axis=0)
        x = pool(x)
        return self._applied(apart(x), batch_mean, batch_var, scale, bias).reshape(x.shape)

    def _applied(self, x: Array, mean: Array, var: Array, scale: Array, bias: Array) -> Array:
        """x normalised, in one pass over it."""
        mean, var, scale, bias = (_tiled(channels, x) for channels in (mean, var, scale, bias))
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        normal = (x.astype(jnp.float32) - mean) * factor + bias
        return normal.astype(self.dtype or x.dtype)


def _unchanged(x: Array) -> Array:
    return x


def _apart(groups: int) -> Callable[[Array], Array]:
    """[B, ...] -> [groups, B / groups, ...]."""
    return lambda x: x.reshape(groups, -1, *x.shape[1:])


def _statistics(rows: Array, near: Array, sync: bool, columns: int) -> tuple[Array, Array, Array]:
    """Mean, variance and unbiased variance of groups, in one pass over them.

    The mean square is taken about a point `near` the mean, the stored one: about 0 the difference
    to the squared mean would cancel where a channel's mean is many times its deviation.

    Args:
      rows: float[G, ..., columns * C].
      near: f32[C].
      sync: over all replicas.
      columns: of a channel.

    Returns:
      f32[G, C] each.
    """
    across = pmean if sync else lambda tree: tree
    axes = tuple(range(1, rows.ndim - 1))
    count = columns * math.prod(rows.shape[1:-1]) * (replicas() if sync else 1)
    near = jax.lax.stop_gradient(near)
    wide = rows.astype(jnp.float32) - _tiled(near, rows)
    sums = jnp.mean(wide, axis=axes), jnp.mean(jnp.square(wide), axis=axes)
    mean, power = across(tuple(pooled(each, columns) for each in sums))
    var = jnp.maximum(power - jnp.square(mean), 0.0)
    return mean + near[None], var, var * (count / max(count - 1, 1))


def _of_product(product: Product, columns: int) -> tuple[Array, Array, Array]:
    """`_statistics` of `product`'s result, [G, ..., columns * C] being its rows.

    Sums are float32 and products of pairs exact: those of bfloat16 rows are as they are, others at
    the highest precision. The kernel is rounded as the convolution rounds it.
    """
    rows = product.rows.reshape(product.rows.shape[0], -1, product.rows.shape[-1])
    channels, features = product.kernel.shape[-2:]
    exact = jax.lax.Precision.HIGHEST
    count = columns * rows.shape[1]
    pairs = jnp.einsum(
        "gnc,gnd->gcd", rows, rows, preferred_element_type=jnp.float32,
        precision=exact if rows.dtype == jnp.float32 else None,
    ) / rows.shape[1]  # fmt: skip
    # Only a column's own channels make a pair.
    pairs = pairs.reshape(-1, columns, channels, columns, channels)
    power = jnp.mean(jnp.stack([pairs[:, i, :, i] for i in range(columns)]), axis=0)
    near = pooled(jnp.mean(rows.astype(jnp.float32), axis=1), columns)
    spread = power - near[:, :, None] * near[:, None, :]
    kernel = product.kernel.reshape(channels, features).astype(rows.dtype).astype(jnp.float32)
    mixed = jnp.einsum("gcd,df->gcf", spread, kernel, precision=exact)
    var = jnp.maximum(jnp.sum(mixed * kernel[None], axis=1), 0.0)
    mean = jnp.einsum("gc,cf->gf", near, kernel, precision=exact)
    return mean, var, var * (count / max(count - 1, 1))


def _tiled(channels: Array, like: Array) -> Array:
    """f32[C] or f32[G, C] for all of `like`'s columns, with axes of length 1 to meet its rank."""
    channels = tiled(channels, like.shape[-1] // channels.shape[-1])
    lead = channels.shape[:-1]
    ones = (1,) * (like.ndim - len(lead) - 1)
    return channels.reshape(*lead, *ones, channels.shape[-1])
