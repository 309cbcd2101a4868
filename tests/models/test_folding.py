"""A network that does not change computes the same with BatchNorm folded and kernels in half."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax import models
from disco_jax.models.encoder import Network, encode
from disco_jax.models.layers.folding import still

SIZE = 32
# Networks without repetitions, and their heads.
NETWORKS = {
    "resnet50": ("swav", {"stage_sizes": (2, 1, 1)}),  # a linear layer with a bias too
    "efficientnet_b0": ("mlp", {"stem": "small"}),
    "mobilenetv3_large": ("mlp", {"stem": "small"}),
    "xcit_tiny_12_p16": ("dino_bn", {}),
}


def network(backbone, norm, dtype="float32"):
    head, fields = NETWORKS[backbone]
    encoder = models.build_encoder(
        helpers.encoder_spec(backbone, head=head, hidden=32, dim=16), dtype
    )
    cut = helpers.cut_backbone(backbone, dtype=encoder.backbone.dtype, **fields)
    return Network(encoder.clone(backbone=cut), norm)


def trained(encoder):
    """Variables as after some training: statistics and scales that are not where they start."""
    rng = np.random.default_rng(0)

    def moved(path, leaf):
        name, leaf = path[-1].key, np.asarray(leaf)
        if name in ("var", "scale") and leaf.ndim == 1:
            return leaf * rng.uniform(0.8, 1.25, leaf.shape).astype(np.float32)
        moves = 0.05 if name in ("mean", "bias") else 0.0
        return leaf + moves * rng.normal(size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(moved, dict(encoder.create(0, SIZE)))


def embedding(network, variables):
    images = {0: jax.random.normal(jax.random.key(1), (16, SIZE, SIZE, 3))}
    run = jax.jit(lambda variables: encode(network, variables, images, (0,), jax.random.key(0))[0])
    return np.asarray(run(variables)[0].embedding)


@pytest.mark.parametrize("backbone", NETWORKS)
def test_stored_statistics_go_into_the_layers_before(backbone):
    teacher = network(backbone, "running")
    variables = trained(teacher.encoder)
    folded = still(teacher, variables, SIZE)
    left, before = (len(jax.tree.leaves(v["batch_stats"])) for v in (folded, variables))
    # XCiT has BatchNorm behind activations too, where it stays.
    assert before > left and (left > 0) == (backbone == "xcit_tiny_12_p16")
    expected, found = (embedding(teacher, v) for v in (variables, folded))
    assert 0 < helpers.relative_error(found, expected) < 1e-4
    plain = dataclasses.replace(teacher, norm="local")
    assert helpers.relative_error(embedding(plain, variables), expected) > 0.01


def test_half_kernels_are_what_a_half_network_computes_with_to_the_bit():
    teacher = network("resnet50", "local", "bfloat16")
    variables = trained(teacher.encoder)
    stored = still(teacher, variables, SIZE)
    assert stored["batch_stats"] is variables["batch_stats"]
    sizes = [sum(x.nbytes for x in jax.tree.leaves(v["params"])) for v in (variables, stored)]
    assert sizes[1] < 0.55 * sizes[0]
    np.testing.assert_array_equal(embedding(teacher, stored), embedding(teacher, variables))


def test_folding_in_half_is_as_near_to_float32_as_not_folding():
    full, half = (network("resnet50", "running", dtype) for dtype in ("float32", "bfloat16"))
    variables = trained(full.encoder)
    exact = embedding(full, variables)
    apart, folded = (embedding(half, v) for v in (variables, still(half, variables, SIZE)))
    errors = [np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in (apart, folded)]
    assert errors[1] < 1.5 * errors[0] < 0.06  # of one draw of roundings and of another


def test_prototypes_stay_in_float32():
    spec = helpers.encoder_spec("resnet8", hidden=8, dim=4, prototypes=(6,), head="swav")
    teacher = Network(models.build_encoder(spec, "bfloat16"), "running")
    params = still(teacher, trained(teacher.encoder), SIZE)["params"]
    assert params["prototypes"]["kernel0"].dtype == np.float32
    assert params["backbone"]["conv1"]["kernel"].dtype == jnp.bfloat16
