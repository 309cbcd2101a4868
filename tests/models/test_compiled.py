"""Compiled networks compute the same operation by operation, and about the same in bfloat16.

Tests one member per family without repetitions, as fusion does not depend on depth. Operation by
operation means compiled without fusion and without optimization, which takes a third of the time
of running eagerly. `test_parity` compares full networks with those of other code.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax.models import Compute

# MobileNets have the blocks of EfficientNets.
NETWORKS = {
    "resnet18": {},
    "efficientnet_b0": {"repeats": (0, 2, 0, 0, 0, 0, 0)},
    "vit_tiny_p16": {"depth": 1},
    "xcit_tiny_12_p16": {},
}


def network(name, dtype=jnp.float32):
    return helpers.cut_backbone(name, compute=Compute(dtype), **NETWORKS[name])


@functools.cache
def case(name):
    """Returns (variables, images) of a network."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(8, 32, 32, 3)), jnp.float32)
    init = functools.partial(network(name).init, norm="running")
    shapes = jax.eval_shape(init, jax.random.key(0), images)

    def draw(path, leaf):
        """Draws kernels that preserve the variance, and the rest about its initial value."""
        mean = 1.0 if path[-1].key in ("scale", "var", "temperature") else 0.0
        bound = 0.1 if leaf.ndim < 2 else np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(mean + bound * rng.uniform(-1, 1, leaf.shape), jnp.float32)

    variables = {"batch_stats": {}, **jax.tree_util.tree_map_with_path(draw, shapes)}
    return variables, images


def outputs(name, dtype, params, stats, images):
    """Returns features, new statistics and gradients with batch statistics."""

    def loss(params):
        features, new = network(name, dtype).apply(
            {"params": params, "batch_stats": stats}, images, norm="local", mutable=["batch_stats"]
        )
        # Weights differ per image, as BatchNorm removes a constant from a gradient.
        weights = jnp.sin(jnp.arange(features.size, dtype=jnp.float32)).reshape(features.shape)
        return jnp.sum(weights * features), (features, new)

    grads, (features, new) = jax.grad(loss, has_aux=True)(params)
    return features, new, grads


@functools.cache
def compiled(name, dtype, **options):
    variables, images = case(name)
    run = jax.jit(functools.partial(outputs, name, dtype), compiler_options=options)
    return run(variables["params"], variables["batch_stats"], images)


def distance(one, other):
    """Returns the distance of all gradients together, relative to the length of `other`."""
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    squares = sum(np.sum(np.square(np.float64(a) - np.float64(b))) for a, b in pairs)
    return np.sqrt(squares / sum(np.sum(np.square(np.float64(b))) for _, b in pairs))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_compiled_network_computes_what_its_operations_do_one_by_one(name):
    features, stats, grads = compiled(name, jnp.float32)
    unfused = compiled(
        name, jnp.float32, xla_disable_hlo_passes="fusion", xla_backend_optimization_level=0
    )
    assert helpers.relative_error(features, unfused[0]) < 1e-5
    for array, expected in zip(*map(jax.tree.leaves, (stats, unfused[1])), strict=True):
        assert helpers.relative_error(array, expected) < 1e-5
    assert distance(grads, unfused[2]) < 1e-4


# For gradients. Rounding changes the sign of some inputs of a ReLU, which then passes a whole
# gradient or none; the activations of the other networks are smooth.
TOLERANCE = {name: 0.2 if name == "resnet18" else 0.1 for name in NETWORKS}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_compiled_network_in_bfloat16_computes_about_the_same(name):
    full, half = (compiled(name, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    assert 0 < helpers.relative_error(half[0], full[0]) < 0.05
    assert 0 < distance(half[2], full[2]) < TOLERANCE[name]
