"""One BatchNorm for every network; the mode is an argument of the call."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.models.columns import pooled, tiled
from disco_jax.models.init import constant, ones, zeros
from disco_jax.ops.collectives import pmean, replicas

# "shuffle" is "local" on images that `encode` traded between replicas first.
MODES = ("local", "sync", "shuffle", "running")


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last (arXiv:1502.03167), as PyTorch counts it.

    norm="local" takes the statistics of groups of `group` images of this replica (0: of all of
    them), "sync" those of the global batch, "running" the stored ones. Outside "running", when
    the collection `batch_stats` is mutable, stored <- momentum * stored + (1 - momentum) * batch,
    with the unbiased variance and, for "local", the mean over the groups. Statistics are float32
    whatever the compute dtype. Without a scale among the parameters the layer before has taken
    the rest in (`fold.still`), and the bias is added. Only "local" with group=0 depends on the
    number of devices.

    Attributes:
      group: images a group in mode "local"; divides the batch of the replica.
      epsilon: added to the variance.
      momentum: the share of the old statistics kept; PyTorch's 0.1 is 0.9 here.
      scale: initial value of the scale; 0 makes a residual branch start as the identity.
      dtype: of the output; None keeps the input's.
      columns: that lie side by side in the channels, see `columns.packed`.
    """

    group: int = 0
    epsilon: float = 1e-5
    momentum: float = 0.9
    scale: float = 1.0
    dtype: jnp.dtype | None = None
    columns: int = 1

    @nn.compact
    def __call__(self, x: Array, *, norm: str) -> Array:
        features = x.shape[-1] // self.columns
        if self.has_variable("params", "bias") and not self.has_variable("params", "scale"):
            bias = self.param("bias", zeros, (features,), jnp.float32)
            bias = _meet(tiled(bias, self.columns), x)
            return (x.astype(jnp.float32) + bias).astype(self.dtype or x.dtype)
        scale = self.param("scale", constant(self.scale), (features,), jnp.float32)
        bias = self.param("bias", zeros, (features,), jnp.float32)
        mean = self.variable("batch_stats", "mean", zeros, None, (features,))
        var = self.variable("batch_stats", "var", ones, None, (features,))
        if norm == "running":
            return self._applied(x, mean.value, var.value, scale, bias)
        groups = 1 if norm == "sync" or not self.group else x.shape[0] // self.group
        rows = x.reshape(groups, -1, *x.shape[1:])
        batch_mean, batch_var, unbiased = _statistics(
            rows, mean.value, norm == "sync", self.columns
        )
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            keep = self.momentum
            mean.value = keep * mean.value + (1 - keep) * jnp.mean(batch_mean, axis=0)
            var.value = keep * var.value + (1 - keep) * jnp.mean(unbiased, axis=0)
        return self._applied(rows, batch_mean, batch_var, scale, bias).reshape(x.shape)

    def _applied(self, x: Array, mean: Array, var: Array, scale: Array, bias: Array) -> Array:
        """x normalised, in one pass over it."""
        mean, var, scale, bias = (
            _meet(tiled(channels, self.columns), x) for channels in (mean, var, scale, bias)
        )
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        normal = (x.astype(jnp.float32) - mean) * factor + bias
        return normal.astype(self.dtype or x.dtype)


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
    wide = rows.astype(jnp.float32) - _meet(tiled(near, columns), rows)
    sums = jnp.mean(wide, axis=axes), jnp.mean(jnp.square(wide), axis=axes)
    mean, power = across(tuple(pooled(each, columns) for each in sums))
    var = jnp.maximum(power - jnp.square(mean), 0.0)
    return mean + near[None], var, var * (count / max(count - 1, 1))


def _meet(channels: Array, like: Array) -> Array:
    """f32[C] or f32[G, C] with axes of length 1 between and before, to meet `like`'s rank."""
    lead = channels.shape[:-1]
    ones = (1,) * (like.ndim - len(lead) - 1)
    return channels.reshape(*lead, *ones, channels.shape[-1])
