"""ResNets: sizes, stems, initial values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax import models
from disco_jax.errors import UserError
from disco_jax.models import Compute
from disco_jax.models.backbones.resnet import ResNet


def build(backbone, **fields):
    return models.build_encoder(helpers.encoder_spec(backbone, **fields))


def test_small_stem_keeps_the_resolution_and_width_is_free():
    encoder = build("resnet8", width=4, hidden=32, dim=16)
    variables = jax.eval_shape(lambda: encoder.create(0, 16))
    assert variables["params"]["backbone"]["conv1"]["kernel"].shape == (3, 3, 3, 4)
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    out = jax.eval_shape(lambda v, x: encoder.apply(v, x, norm="running"), variables, images)
    assert out.features.shape == (2, 16) and out.embedding.shape == (2, 16)


def test_initial_values_are_those_of_torchvision_and_follow_the_seed():
    encoder = build("resnet18", hidden=2048)
    params = encoder.create(0, 32)["params"]
    kernel = params["backbone"]["conv1"]["kernel"]
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / (49 * 64)), rel=0.02)
    for name, fan_in in (("hidden", 512), ("out", 2048)):
        for leaf in params["head"][name].values():
            assert np.max(np.abs(leaf)) <= 1 / np.sqrt(fan_in)
            assert np.std(leaf) == pytest.approx(1 / np.sqrt(3 * fan_in), rel=0.1)
    again = encoder.create(0, 32)["params"]
    other = encoder.create(1, 32)["params"]
    np.testing.assert_array_equal(again["backbone"]["conv1"]["kernel"], kernel)
    assert not np.allclose(other["backbone"]["conv1"]["kernel"], kernel)


def test_residual_branches_start_at_zero_when_asked_to():
    params = build("resnet8", zero_init_residual=True).create(0, 16)["params"]["backbone"]
    assert np.all(params["layer1_0"]["bn2"]["scale"] == 0)
    assert np.all(params["layer1_0"]["bn1"]["scale"] == 1)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"config\.student\.backbone.*Did you mean 'resnet50'"):
        build("resnet500")
    with pytest.raises(UserError, match=r"config\.student\.stem"):
        build("resnet18", stem="smal")


def small(block, optimized, dtype):
    """Returns two stages, with all or no optimizations."""
    compute = Compute(dtype).plain()
    if optimized:
        compute = Compute(dtype, width_packing=True, stats_from_input=True, shift_and_add=True)
    return ResNet((2, 1), block, width=8, compute=compute)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_quicker_ways_have_the_same_gradients_and_are_no_less_precise(block):
    """Uses batch statistics and some negative scales, which affect the first max-pool."""
    images = jax.random.normal(jax.random.key(1), (8, 32, 32, 3))
    variables = small(block, False, jnp.float32).init(jax.random.key(0), images, norm="running")
    keys = iter(jax.random.split(jax.random.key(2), 100))
    params = jax.tree.map(
        lambda x: x + 0.7 * jax.random.normal(next(keys), x.shape) * (x.ndim == 1),
        variables["params"],
    )

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def outputs(optimized, dtype):
        def loss(params):
            out, new = small(block, optimized, dtype).apply(
                {**variables, "params": params}, images, norm="local", mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(out)), new["batch_stats"]

        return jax.value_and_grad(loss, has_aux=True)(params)

    exact = outputs(False, jnp.float32)
    # Images that differ by 1e-6 move these gradients by 6e-5; sums in another order by 2e-4.
    pairs = zip(*map(jax.tree.leaves, (exact, outputs(True, jnp.float32))), strict=True)
    assert all(helpers.relative_error(array, expected) < 1e-3 for expected, array in pairs)

    def mean_error(optimized):
        half = outputs(optimized, jnp.bfloat16)
        pairs = zip(*map(jax.tree.leaves, (exact, half)), strict=True)
        return np.mean([helpers.relative_error(array, expected) for expected, array in pairs])

    assert 0 < mean_error(True) < 1.1 * mean_error(False)
