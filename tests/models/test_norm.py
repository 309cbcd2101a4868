"""BatchNorm in its modes, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disco_jax.models.encoder import Encoded, Network, encode
from disco_jax.models.norm import BatchNorm
from disco_jax.ops.collectives import AXIS

REPLICAS, BATCH = 4, 6
X = np.random.default_rng(0).normal(3.0, 2.0, (REPLICAS, BATCH, 5, 2)).astype(np.float32)
STATS = {"mean": np.float32([1.0, -1.0]), "var": np.float32([4.0, 0.25])}
VARIABLES = {
    "params": {"scale": np.float32([2.0, 0.5]), "bias": np.float32([0.1, -0.2])},
    "batch_stats": STATS,
}


def normalised(x, groups):
    """X[groups of examples] normalised a group at a time, and the statistics to store."""
    grouped = x.astype(np.float64).reshape(groups, -1, x.shape[-1])
    mean, var = grouped.mean(1, keepdims=True), grouped.var(1, keepdims=True)
    out = ((grouped - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    unbiased = var * grouped.shape[1] / (grouped.shape[1] - 1)
    out = out * VARIABLES["params"]["scale"] + VARIABLES["params"]["bias"]
    return out, mean.mean((0, 1)), unbiased.mean((0, 1))


def apply(norm, group=0):
    module = BatchNorm(group=group)

    def one(x):
        out, new = module.apply(VARIABLES, x, norm=norm, mutable=["batch_stats"])
        return out, new["batch_stats"]

    return jax.vmap(one, axis_name=AXIS)(jnp.asarray(X))


def stored(old, new):
    return 0.9 * old + 0.1 * new


@pytest.mark.parametrize("group, groups", [(0, 1), (2, 3), (6, 1)])
def test_local_statistics_of_each_replica_or_group(group, groups):
    out, new = apply("local", group)
    for replica in range(REPLICAS):
        expected, mean, var = normalised(X[replica], groups)
        np.testing.assert_allclose(out[replica], expected, atol=1e-5)
        np.testing.assert_allclose(new["mean"][replica], stored(STATS["mean"], mean), rtol=1e-5)
        np.testing.assert_allclose(new["var"][replica], stored(STATS["var"], var), rtol=1e-5)


def test_sync_statistics_of_the_global_batch():
    out, new = apply("sync")
    expected, mean, var = normalised(X, 1)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for replica in range(REPLICAS):
        np.testing.assert_allclose(new["mean"][replica], stored(STATS["mean"], mean), rtol=1e-5)
        np.testing.assert_allclose(new["var"][replica], stored(STATS["var"], var), rtol=1e-5)


def test_running_statistics_are_read_and_left_alone():
    out, new = apply("running")
    expected = (X - STATS["mean"]) / np.sqrt(STATS["var"] + 1e-5)
    expected = expected * VARIABLES["params"]["scale"] + VARIABLES["params"]["bias"]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(new["mean"][0], STATS["mean"])
    np.testing.assert_array_equal(new["var"][0], STATS["var"])


class Normaliser(BatchNorm):
    """A BatchNorm where a network is asked for."""

    def __call__(self, images, *, norm):
        out = super().__call__(images, norm=norm)
        return Encoded(out, out)


def test_shuffled_keys_are_normalised_among_strangers_and_come_home():
    network = Network(Normaliser(), norm="shuffle")

    def one(x):
        encoded, _ = encode(network, VARIABLES, {1: x}, (1,), jax.random.key(0))
        return encoded[1].features

    out = jax.vmap(one, axis_name=AXIS)(jnp.asarray(X))
    own = np.stack([normalised(x, 1)[0] for x in X])
    assert not np.allclose(out, own, atol=1e-2)
    # Each is still its own image: an affine function of it, one of the four replicas' statistics.
    for mine, image in zip(out.reshape(-1, 5, 2), X.reshape(-1, 5, 2), strict=True):
        for channel in range(2):
            assert np.corrcoef(mine[:, channel], image[:, channel])[0, 1] > 0.9999
