"""One BatchNorm for every network; the mode is an argument of the call."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

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
    whatever the compute dtype. Only "local" with group=0 depends on the number of devices.

    Attributes:
      group: images a group in mode "local"; divides the batch of the replica.
      epsilon: added to the variance.
      momentum: the share of the old statistics kept; PyTorch's 0.1 is 0.9 here.
      scale: initial value of the scale; 0 makes a residual branch start as the identity.
      dtype: of the output; None keeps the input's.
    """

    group: int = 0
    epsilon: float = 1e-5
    momentum: float = 0.9
    scale: float = 1.0
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array, *, norm: str) -> Array:
        features = x.shape[-1]
        scale = self.param("scale", constant(self.scale), (features,), jnp.float32)
        bias = self.param("bias", zeros, (features,), jnp.float32)
        mean = self.variable("batch_stats", "mean", zeros, None, (features,))
        var = self.variable("batch_stats", "var", ones, None, (features,))
        if norm == "running":
            x = (x.astype(jnp.float32) - _last(mean.value, x)) * _last(
                scale * jnp.reciprocal(jnp.sqrt(var.value + self.epsilon)), x
            )
        else:
            groups = 1 if norm == "sync" or not self.group else x.shape[0] // self.group
            rows = x.astype(jnp.float32).reshape(groups, -1, features)
            rows, batch_mean, batch_var = self._normalise(rows, sync=norm == "sync")
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                keep = self.momentum
                mean.value = keep * mean.value + (1 - keep) * batch_mean
                var.value = keep * var.value + (1 - keep) * batch_var
            x = rows.reshape(x.shape) * _last(scale, x)
        return (x + _last(bias, x)).astype(self.dtype or x.dtype)

    def _normalise(self, rows: Array, sync: bool) -> tuple[Array, Array, Array]:
        """f32[G, N, C] -> normalised rows, and the mean and unbiased variance f32[C] to store."""
        across = pmean if sync else lambda tree: tree
        count = rows.shape[1] * (replicas() if sync else 1)
        mean = across(jnp.mean(rows, axis=1, keepdims=True))
        var = across(jnp.mean(jnp.square(rows - mean), axis=1, keepdims=True))
        rows = (rows - mean) * jnp.reciprocal(jnp.sqrt(var + self.epsilon))
        unbiased = var * (count / max(count - 1, 1))
        return rows, jnp.mean(mean, axis=(0, 1)), jnp.mean(unbiased, axis=(0, 1))


def _last(channels: Array, like: Array) -> Array:
    """f32[C] with leading axes of length 1, to meet an array of `like`'s rank."""
    return channels.reshape((1,) * (like.ndim - 1) + (-1,))
