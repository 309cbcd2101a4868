"""BatchNorm, the same module for every network; the mode is an argument of the call."""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.models.layers.initializers import constant, ones, zeros
from disco_jax.models.layers.packing import average_columns, repeat_channels
from disco_jax.ops.collectives import group_pmean, replicas

# "shuffle" is "local" on images that `encode` shuffled across replicas beforehand.
MODES = ("local", "sync", "shuffle", "running")
# Statistics come from the input of a 1x1 convolution only if it widens at least 2x and has at
# least 16 positions per input channel; otherwise the input's covariance costs more than it saves.
_MIN_WIDENING = 2
_MIN_POSITIONS_PER_CHANNEL = 16


class ConvInput(NamedTuple):
    """Input and weights of the 1x1 convolution whose output BatchNorm normalizes.

    Attributes:
      x: float[B, H, W, packing * C], the input.
      kernel: f32[..., C, F], the weights.
    """

    x: Array
    kernel: Array

    @classmethod
    def of(cls, layer: nn.Module, x: Array) -> "ConvInput":
        """Returns the input `x` and the weights of a convolution that has been called."""
        return cls(x, layer.variables["params"]["kernel"])

    def pays(self, groups: int) -> bool:
        """Returns whether statistics of `groups` groups cost less from the input."""
        channels, features = self.kernel.shape[-2:]
        positions = math.prod(self.x.shape) // (channels * groups)
        widens = features >= _MIN_WIDENING * channels
        return widens and positions >= _MIN_POSITIONS_PER_CHANNEL * channels


class BatchNorm(nn.Module):
    """Batch normalization over all axes but the last (arXiv:1502.03167), with PyTorch's updates.

    The mode "local" takes the statistics of groups of `group` images of this replica (0: of all
    its images), "sync" those of `sync_groups` equal parts of the global batch, "running" the stored
    ones. In all modes but "running", if the collection `batch_stats` is mutable, the stored
    statistics become momentum * stored + (1 - momentum) * batch, with the unbiased variance and the
    mean over this replica's groups. Statistics are float32 whatever the dtype of the computation.
    Without a scale among the parameters, `folding` has moved everything but the bias into the layer
    before, and only the bias is added. Only "local" with group=0 depends on the number of devices.

    Attributes:
      group: images per group in the mode "local"; must divide the batch of a replica.
      epsilon: added to the variance.
      momentum: weight of the old statistics; PyTorch's 0.1 is 0.9 here.
      scale: initial value of the scale; 0 makes a residual branch start as the identity.
      dtype: dtype of the output; None: that of the input.
      width_packing: packed columns of the input, see `packing.pack_width`.
      sync_groups: parts of the global batch that share statistics in the mode "sync"; must divide
        the number of replicas or be a multiple of it.
    """

    group: int = 0
    epsilon: float = 1e-5
    momentum: float = 0.9
    scale: float = 1.0
    dtype: jnp.dtype | None = None
    width_packing: int = 1
    sync_groups: int = 1

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        norm: str,
        conv_input: ConvInput | None = None,
        pool: Callable[[Array], Array] | None = None,
    ) -> Array:
        """Normalizes x.

        Args:
          x: float[B, ..., width_packing * C].
          norm: mode; see the class.
          conv_input: input and weights of the 1x1 convolution that computed x. If they pay, the
            statistics of x = u W come from u: E[x] = E[u] W and Var[x] = diag(W' Cov[u] W), so
            that x can be normalized while it is computed. Ignored in the mode "sync", in which
            replicas would exchange C^2 numbers instead of F.
          pool: a max-pool of the normalized map. It commutes with increasing functions, so it runs
            first and only its output is normalized; channels with a negative scale change their
            sign for it. It may pack columns.

        Returns:
          float[B, ..., width_packing * C], or the shape of the output of `pool`.
        """
        features = x.shape[-1] // self.width_packing
        pool = pool or _identity
        if self.has_variable("params", "bias") and not self.has_variable("params", "scale"):
            bias = self.param("bias", zeros, (features,), jnp.float32)
            x = pool(x)
            bias = _broadcast(bias, x)
            return (x.astype(jnp.float32) + bias).astype(self.dtype or x.dtype)
        scale = self.param("scale", constant(self.scale), (features,), jnp.float32)
        bias = self.param("bias", zeros, (features,), jnp.float32)
        mean = self.variable("batch_stats", "mean", zeros, None, (features,))
        var = self.variable("batch_stats", "var", ones, None, (features,))
        sign: float | Array = 1.0
        if pool is not _identity:
            sign = signs = jax.lax.stop_gradient(jnp.where(scale < 0, -1.0, 1.0))
            x, scale = x * _broadcast(signs, x).astype(x.dtype), scale * sign
        stored_mean = mean.value * sign
        if norm == "running":
            return self._normalize(pool(x), stored_mean, var.value, scale, bias)
        sync = self.sync_groups if norm == "sync" else 0
        groups = local_groups(sync) if sync else x.shape[0] // (self.group or x.shape[0])
        split = _split_groups(groups)
        if not sync and conv_input and conv_input.pays(groups):
            conv_input = conv_input._replace(x=split(conv_input.x))
            batch_mean, batch_var, unbiased = _input_statistics(conv_input, self.width_packing)
        else:
            batch_mean, batch_var, unbiased = _statistics(
                split(x), stored_mean, sync, self.width_packing
            )
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            old, new = self.momentum, 1 - self.momentum
            mean.value = old * mean.value + new * jnp.mean(batch_mean, axis=0) * sign
            var.value = old * var.value + new * jnp.mean(unbiased, axis=0)
        x = pool(x)
        return self._normalize(split(x), batch_mean, batch_var, scale, bias).reshape(x.shape)

    def _normalize(self, x: Array, mean: Array, var: Array, scale: Array, bias: Array) -> Array:
        """Applies (x - mean) * scale / sqrt(var + epsilon) + bias in one pass over x."""
        mean, var, scale, bias = (_broadcast(channels, x) for channels in (mean, var, scale, bias))
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        normalized = (x.astype(jnp.float32) - mean) * factor + bias
        return normalized.astype(self.dtype or x.dtype)


def local_groups(sync_groups: int) -> int:
    """Returns how many of `BatchNorm.sync_groups` lie on one replica; 1 if they span replicas.

    Raises:
      AssertionError: while tracing, if a group would consist of parts of replicas.
    """
    count = replicas()
    assert sync_groups % count == 0 or count % sync_groups == 0, (sync_groups, count)
    return max(sync_groups // count, 1)


def _identity(x: Array) -> Array:
    return x


def _split_groups(groups: int) -> Callable[[Array], Array]:
    """Returns a function that reshapes [B, ...] to [groups, B / groups, ...]."""
    return lambda x: x.reshape(groups, -1, *x.shape[1:])


def _statistics(x: Array, shift: Array, sync: int, packing: int) -> tuple[Array, Array, Array]:
    """Computes mean, variance and unbiased variance of each group in one pass over x.

    Squares are taken about `shift`, a point near the mean. About 0, the difference of mean square
    and squared mean would cancel if a channel's mean is many times its standard deviation.

    Args:
      x: float[G, ..., packing * C].
      shift: f32[C], the stored mean.
      sync: parts of the global batch that share statistics; 0: only groups of this replica do.
      packing: packed columns of x.

    Returns:
      Three arrays f32[G, C].
    """
    size = max(replicas() // sync, 1) if sync else 1  # replicas that share statistics
    axes = tuple(range(1, x.ndim - 1))
    count = packing * math.prod(x.shape[1:-1]) * size
    shift = jax.lax.stop_gradient(shift)
    centered = x.astype(jnp.float32) - _broadcast(shift, x)
    moments = jnp.mean(centered, axis=axes), jnp.mean(jnp.square(centered), axis=axes)
    averages = tuple(average_columns(moment, packing) for moment in moments)
    mean, square = group_pmean(averages, sync) if size > 1 else averages
    var = jnp.maximum(square - jnp.square(mean), 0.0)
    return mean + shift[None], var, var * (count / max(count - 1, 1))


def _input_statistics(conv_input: ConvInput, packing: int) -> tuple[Array, Array, Array]:
    """Computes `_statistics` of a 1x1 convolution's output from its input.

    Sums are float32. Products of pairs are exact: bfloat16 inputs are multiplied as they are,
    float32 inputs at the highest precision. The kernel is rounded as the convolution rounds it.

    Args:
      conv_input: the input, float[G, ..., packing * C], and the weights.
      packing: packed columns of the input.

    Returns:
      Three arrays f32[G, F].
    """
    x = conv_input.x.reshape(conv_input.x.shape[0], -1, conv_input.x.shape[-1])
    channels, features = conv_input.kernel.shape[-2:]
    highest = jax.lax.Precision.HIGHEST
    count = packing * x.shape[1]
    pairs = jnp.einsum(
        "gnc,gnd->gcd", x, x, preferred_element_type=jnp.float32,
        precision=highest if x.dtype == jnp.float32 else None,
    ) / x.shape[1]  # fmt: skip
    # Products of channels of different columns do not belong to the covariance.
    pairs = pairs.reshape(-1, packing, channels, packing, channels)
    square = jnp.mean(jnp.stack([pairs[:, i, :, i] for i in range(packing)]), axis=0)
    input_mean = average_columns(jnp.mean(x.astype(jnp.float32), axis=1), packing)
    covariance = square - input_mean[:, :, None] * input_mean[:, None, :]
    kernel = conv_input.kernel.reshape(channels, features).astype(x.dtype).astype(jnp.float32)
    mixed = jnp.einsum("gcd,df->gcf", covariance, kernel, precision=highest)
    var = jnp.maximum(jnp.sum(mixed * kernel[None], axis=1), 0.0)
    mean = jnp.einsum("gc,cf->gf", input_mean, kernel, precision=highest)
    return mean, var, var * (count / max(count - 1, 1))


def _broadcast(channels: Array, like: Array) -> Array:
    """Repeats f32[C] or f32[G, C] for packed columns and adds axes up to the rank of `like`."""
    channels = repeat_channels(channels, like.shape[-1] // channels.shape[-1])
    lead = channels.shape[:-1]
    ones = (1,) * (like.ndim - len(lead) - 1)
    return channels.reshape(*lead, *ones, channels.shape[-1])
