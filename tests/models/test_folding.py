"""A network that never changes computes the same with BatchNorm folded and kernels in half."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax import models
from disco_jax.models.encoder import Network, encode
from disco_jax.models.layers.folding import fold_batch_norm

SIZE = 32
# Networks without repetitions, with their heads.
NETWORKS = {
    "resnet50": ("swav", {"stage_sizes": (2, 1, 1)}),  # with a linear layer that has a bias
    "efficientnet_b0": ("mlp", {"stem": "small"}),
    "mobilenetv3_large": ("mlp", {"stem": "small"}),
    "xcit_tiny_12_p16": ("dino_bn", {}),
}


def network(backbone, norm, dtype=jnp.float32):
    head, fields = NETWORKS[backbone]
    compute = models.Compute(dtype)
    spec = helpers.encoder_spec(backbone, head=head, hidden=32, dim=16)
    encoder = models.build_encoder(spec, compute)
    short = helpers.cut_backbone(backbone, compute=compute, **fields)
    return Network(encoder.clone(backbone=short), norm)


def trained(encoder):
    """Returns variables whose statistics and scales differ from their initial values."""
    rng = np.random.default_rng(0)

    def disturb(path, leaf):
        name, leaf = path[-1].key, np.asarray(leaf)
        if name in ("var", "scale") and leaf.ndim == 1:
            return leaf * rng.uniform(0.8, 1.25, leaf.shape).astype(np.float32)
        noise = 0.05 if name in ("mean", "bias") else 0.0
        return leaf + noise * rng.normal(size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(disturb, dict(encoder.create(0, SIZE)))


def embedding(network, variables):
    images = np.random.default_rng(1).normal(size=(16, SIZE, SIZE, 3)).astype(np.float32)
    return np.asarray(encoded(network, variables, {0: images})[0].embedding)


@functools.partial(jax.jit, static_argnums=0)
def encoded(network, variables, images):
    return encode(network, variables, images, (0,), jax.random.key(0))[0]


@pytest.mark.parametrize("backbone", NETWORKS)
def test_stored_statistics_go_into_the_layers_before(backbone):
    teacher = network(backbone, "running")
    variables = trained(teacher.encoder)
    folded = fold_batch_norm(teacher, variables, SIZE)
    after, before = (len(jax.tree.leaves(v["batch_stats"])) for v in (folded, variables))
    # XCiT also has BatchNorm after activations, which is not folded.
    assert before > after and (after > 0) == (backbone == "xcit_tiny_12_p16")
    expected, output = (embedding(teacher, v) for v in (variables, folded))
    assert 0 < helpers.relative_error(output, expected) < 1e-4
    initial = {**variables, "batch_stats": dict(teacher.encoder.create(0, SIZE))["batch_stats"]}
    assert helpers.relative_error(embedding(teacher, initial), expected) > 0.01


def test_half_kernels_are_what_a_half_network_computes_with_to_the_bit():
    teacher = network("resnet50", "local", jnp.bfloat16)
    variables = trained(teacher.encoder)
    folded = fold_batch_norm(teacher, variables, SIZE)
    assert folded["batch_stats"] is variables["batch_stats"]
    sizes = [sum(x.nbytes for x in jax.tree.leaves(v["params"])) for v in (variables, folded)]
    assert sizes[1] < 0.55 * sizes[0]
    np.testing.assert_array_equal(embedding(teacher, folded), embedding(teacher, variables))


def test_folding_in_half_is_as_near_to_float32_as_not_folding():
    full, half = (network("resnet50", "running", dtype) for dtype in (jnp.float32, jnp.bfloat16))
    variables = trained(full.encoder)
    exact = embedding(full, variables)
    folded = fold_batch_norm(half, variables, SIZE)
    outputs = [embedding(half, v) for v in (variables, folded)]
    errors = [np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in outputs]
    assert errors[1] < 1.5 * errors[0] < 0.06  # two draws of rounding errors


def test_prototypes_stay_in_float32():
    spec = helpers.encoder_spec("resnet8", hidden=8, dim=4, prototypes=(6,), head="swav")
    teacher = Network(models.build_encoder(spec, models.Compute(jnp.bfloat16)), "running")
    params = fold_batch_norm(teacher, trained(teacher.encoder), SIZE)["params"]
    assert params["prototypes"]["kernel0"].dtype == np.float32
    assert params["backbone"]["conv1"]["kernel"].dtype == jnp.bfloat16


def test_a_network_without_folding_keeps_its_variables():
    compute = models.Compute(jnp.bfloat16, fold_frozen=False)
    spec = helpers.encoder_spec("resnet8", width=4, hidden=8, dim=4)
    teacher = Network(models.build_encoder(spec, compute), "running")
    variables = teacher.encoder.create(0, 16)
    assert fold_batch_norm(teacher, variables, 16) is variables
