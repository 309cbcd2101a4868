"""BatchNorm in its modes, against NumPy in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disco_jax.models.encoder import Encoded, Network, encode
from disco_jax.models.layers.norm import BatchNorm, ConvInput
from disco_jax.models.layers.packing import pack_width, unpack_width
from disco_jax.ops.collectives import AXIS

REPLICAS, BATCH = 4, 6
X = np.random.default_rng(0).normal(3.0, 2.0, (REPLICAS, BATCH, 5, 2)).astype(np.float32)
STATS = {"mean": np.float32([1.0, -1.0]), "var": np.float32([4.0, 0.25])}
VARIABLES = {
    "params": {"scale": np.float32([2.0, 0.5]), "bias": np.float32([0.1, -0.2])},
    "batch_stats": STATS,
}


def normalised(x, groups):
    """Normalizes x in groups of examples; returns it with the mean and variance to store."""
    grouped = x.astype(np.float64).reshape(groups, -1, x.shape[-1])
    mean, var = grouped.mean(1, keepdims=True), grouped.var(1, keepdims=True)
    out = ((grouped - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    unbiased = var * grouped.shape[1] / (grouped.shape[1] - 1)
    out = out * VARIABLES["params"]["scale"] + VARIABLES["params"]["bias"]
    return out, mean.mean((0, 1)), unbiased.mean((0, 1))


def apply(norm, x=X, **fields):
    module = BatchNorm(**fields)

    def one(x):
        out, new = module.apply(VARIABLES, x, norm=norm, mutable=["batch_stats"])
        return out, new["batch_stats"]

    return jax.jit(jax.vmap(one, axis_name=AXIS))(x)


def stored(old, new):
    return 0.9 * old + 0.1 * new


@pytest.mark.parametrize("group, groups", [(0, 1), (2, 3), (6, 1)])
def test_local_statistics_of_each_replica_or_group(group, groups):
    out, new = apply("local", group=group)
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


@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
def test_sync_statistics_of_parts_of_the_global_batch(replicas):
    """Two groups lie on one replica, on one replica each, or on two or four replicas each."""
    rows = X.reshape(-1, *X.shape[2:])
    out, new = apply("sync", rows.reshape(replicas, -1, *X.shape[2:]), sync_groups=2)
    expected, mean, var = normalised(rows, 2)
    np.testing.assert_allclose(out.reshape(rows.shape), expected, atol=1e-5)
    for name, value in (("mean", mean), ("var", var)):
        average = np.mean(new[name], axis=0)  # as the step averages them over replicas
        np.testing.assert_allclose(average, stored(STATS[name], value), rtol=1e-5)


def test_running_statistics_are_read_and_left_alone():
    out, new = apply("running")
    expected = (X - STATS["mean"]) / np.sqrt(STATS["var"] + 1e-5)
    expected = expected * VARIABLES["params"]["scale"] + VARIABLES["params"]["bias"]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(new["mean"][0], STATS["mean"])
    np.testing.assert_array_equal(new["var"][0], STATS["var"])


class Normaliser(BatchNorm):
    """A BatchNorm with the call of an encoder."""

    def __call__(self, images, *, norm):
        out = super().__call__(images, norm=norm)
        return Encoded(out, out)


def test_shuffled_keys_are_normalised_among_strangers_and_come_home():
    network = Network(Normaliser(), norm="shuffle")

    def one(x):
        encoded, _ = encode(network, VARIABLES, {1: x}, (1,), jax.random.key(0))
        return encoded[1].features

    out = jax.jit(jax.vmap(one, axis_name=AXIS))(X)
    own = np.stack([normalised(x, 1)[0] for x in X])
    assert not np.allclose(out, own, atol=1e-2)
    # Each output is an affine function of its image, with the statistics of one of four replicas.
    for rows, image in zip(out.reshape(-1, 5, 2), X.reshape(-1, 5, 2), strict=True):
        for channel in range(2):
            assert np.corrcoef(rows[:, channel], image[:, channel])[0, 1] > 0.9999


def far_channels():
    """Returns f32[8, 4, 4, 5] with constant channels and means up to 100 deviations from 0."""
    rng = np.random.default_rng(1)
    means, deviations = [100.0, 0.0, -7.3, 100.0, 3.0], [0.0, 0.0, 0.0, 1.0, 1.0]
    return (means + deviations * rng.normal(size=(8, 4, 4, 5))).astype(np.float32)


@pytest.mark.parametrize("compiled", [True, False])
def test_channels_far_from_0_and_constant_ones_are_normalised(compiled):
    """Exact about a stored mean; about the initial 0, as precise as float32 squares allow."""
    x = far_channels()
    exact, weights = x.astype(np.float64), np.random.default_rng(2).normal(size=x.shape)
    mean, var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    expected = (exact - mean) / np.sqrt(var + 1e-5)

    def outputs(x, stored_mean):
        def loss(x):
            stats = {"mean": stored_mean, "var": jnp.ones(5)}
            params = {"scale": jnp.ones(5), "bias": jnp.zeros(5)}
            out, new = BatchNorm().apply(
                {"params": params, "batch_stats": stats}, x, norm="local", mutable=["batch_stats"]
            )
            return jnp.sum(out * weights.astype(np.float32)), (out, new["batch_stats"])

        gradient, (out, new) = jax.grad(loss, has_aux=True)(x)
        return out, (new["var"] - 0.9) / 0.1, gradient

    run = jax.jit(outputs) if compiled else outputs
    out, unbiased, gradient = run(x, mean.astype(np.float32))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(unbiased, exact.var((0, 1, 2), ddof=1), atol=2e-6)
    centred = weights - weights.mean((0, 1, 2))
    straight = centred - expected * (centred * expected).mean((0, 1, 2))
    exact_gradient = straight / np.sqrt(var + 1e-5)
    tolerance = 1e-4 * np.abs(exact_gradient).max()
    np.testing.assert_allclose(gradient, exact_gradient, rtol=1e-4, atol=tolerance)
    out, unbiased, _ = run(x, np.zeros(5, np.float32))
    np.testing.assert_allclose(out, expected, atol=5e-3)
    rounding = 5 * np.spacing(np.float32(100**2))  # of the mean square
    np.testing.assert_allclose(unbiased, exact.var((0, 1, 2), ddof=1), atol=rounding)


POOLS = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding=((1, 1),) * 2)
SIGNED = {
    "params": {"scale": jnp.asarray([2.0, -0.5, 0.1]), "bias": jnp.asarray([0.1, 0.3, -0.2])},
    "batch_stats": {"mean": jnp.asarray([1.0, -1.0, 0.5]), "var": jnp.asarray([4.0, 0.25, 1.0])},
}


def with_gradients(function, *arguments):
    """Returns the output, the new statistics, and gradients of a randomly weighted sum."""

    def loss(*arguments):
        out, new = function(*arguments)
        weights = np.random.default_rng(7).normal(size=out.shape).astype(np.float32)
        return jnp.sum(weights * out.astype(jnp.float32)), (out, new)

    both = jax.grad(loss, tuple(range(len(arguments))), has_aux=True)
    gradients, (out, new) = jax.jit(both)(*arguments)
    return jax.tree.leaves((out, new, gradients))


@pytest.mark.parametrize("norm, group", [("local", 0), ("local", 2), ("running", 0)])
def test_a_max_pool_before_the_normalisation_is_one_after_it(norm, group):
    """Includes a channel with a negative scale, whose largest outputs are its smallest inputs."""
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 3)) * 3 + 1

    def run(params, x, first):
        variables = {**SIGNED, "params": params}
        module = BatchNorm(group=group)
        pool = POOLS if first else None
        out, new = module.apply(variables, x, norm=norm, mutable=["batch_stats"], pool=pool)
        out = nn.relu(out)
        return (out if first else POOLS(out)), new

    after, before = (
        with_gradients(functools.partial(run, first=first), SIGNED["params"], x)
        for first in (False, True)
    )
    for expected, array in zip(after, before, strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-5)


def test_a_max_pool_before_the_normalisation_knows_the_global_batch():
    """Two replicas of two images equal one replica of four, in statistics and gradients too."""
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 3)) * 3 + 1

    def of_replicas(count):
        def run(params, x):
            def one(x):
                variables = {**SIGNED, "params": params}
                return BatchNorm().apply(
                    variables, x, norm="sync", mutable=["batch_stats"], pool=POOLS
                )

            out, new = jax.vmap(one, axis_name=AXIS)(x.reshape(count, -1, *x.shape[1:]))
            return out.reshape(4, *out.shape[2:]), jax.tree.map(lambda each: each[0], new)

        return with_gradients(run, SIGNED["params"], x)

    for whole, parts in zip(of_replicas(1), of_replicas(2), strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)


def normalized_product(rows, kernel, params, packing, group, dtype, from_input):
    """Returns BatchNorm of rows @ kernel, in `dtype`, and the new statistics."""
    module = BatchNorm(group=group, width_packing=packing, dtype=dtype)
    features = kernel.shape[-1]
    stats = {"mean": jnp.zeros(features), "var": jnp.ones(features)}
    rows = rows.astype(dtype)
    product = jnp.matmul(rows, kernel.astype(dtype), precision="highest")
    conv_input = ConvInput(pack_width(rows, packing), kernel[None, None])
    out, new = module.apply(
        {"params": params, "batch_stats": stats},
        pack_width(product, packing),
        norm="local",
        conv_input=conv_input if from_input else None,
        mutable=["batch_stats"],
    )
    return unpack_width(out, packing), new


def factors(features=12, channels=4):
    """Returns inputs and weights of a 1x1 convolution, and parameters of its BatchNorm."""
    keys = jax.random.split(jax.random.key(3), 4)
    params = {
        "scale": 1 + 0.3 * jax.random.normal(keys[2], (features,)),
        "bias": 0.1 * jax.random.normal(keys[3], (features,)),
    }
    # Far from 0 and in part equal, as after a ReLU.
    rows = jax.nn.relu(jax.random.normal(keys[0], (4, 8, 8, channels)) + 2)
    return rows, jax.random.normal(keys[1], (channels, features)), params


@pytest.mark.parametrize("packing, group", [(2, 0), (1, 2)])
def test_statistics_of_a_product_from_its_factors_are_its_own(packing, group):
    def outputs(from_input):
        function = functools.partial(
            normalized_product, packing=packing, group=group, dtype=jnp.float32,
            from_input=from_input,
        )  # fmt: skip
        return with_gradients(function, *factors())

    for expected, array in zip(outputs(False), outputs(True), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-4 * scale)


def test_statistics_of_the_global_batch_are_the_products_own():
    """Statistics in the mode "sync" come from the output, as fewer numbers are exchanged."""
    rows, kernel, params = factors()
    stats = {"mean": jnp.zeros(12), "var": jnp.ones(12)}

    def run(with_input):
        def one(rows):
            return BatchNorm().apply(
                {"params": params, "batch_stats": stats},
                rows @ kernel,
                norm="sync",
                conv_input=ConvInput(rows, kernel[None, None]) if with_input else None,
                mutable=["batch_stats"],
            )

        return jax.jit(jax.vmap(one, axis_name=AXIS))(rows.reshape(2, 2, *rows.shape[1:]))

    for expected, array in zip(*(jax.tree.leaves(run(way)) for way in (False, True)), strict=True):
        np.testing.assert_array_equal(array, expected)


def test_statistics_of_a_product_in_half_are_exact():
    """They are those of the rounded factors, without the rounding error of the product."""
    rows, kernel, params = factors()
    function = functools.partial(
        normalized_product, packing=1, group=0, dtype=jnp.bfloat16, from_input=True
    )
    new = jax.jit(function)(rows, kernel, params)[1]["batch_stats"]
    rows, kernel = (np.asarray(x.astype(jnp.bfloat16), np.float64) for x in (rows, kernel))
    product = (rows @ kernel).reshape(-1, kernel.shape[-1])
    np.testing.assert_allclose(new["mean"], 0.1 * product.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["var"], 0.9 + 0.1 * product.var(0, ddof=1), rtol=1e-5)


def test_only_products_wider_than_their_factors_count_on_them():
    rows = jnp.zeros((4, 8, 8, 4))
    wide, narrow = jnp.zeros((1, 1, 4, 8)), jnp.zeros((1, 1, 4, 7))
    assert ConvInput(rows, wide).pays(groups=1)
    assert not ConvInput(rows, narrow).pays(groups=1)
    assert not ConvInput(rows, wide).pays(groups=8)
    assert not ConvInput(pack_width(rows, 2), wide).pays(groups=8)
