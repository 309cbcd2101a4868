"""Convolutions and max-pools of shifted maps are the plain ones."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax import models, typed
from disco_jax.evaluate import cost, features
from disco_jax.models.encoder import Encoder
from disco_jax.models.heads import Identity
from disco_jax.models.layers.shifts import max_pool, shift_and_add
from disco_jax.train import experiment
from disco_jax.train.run_settings import RunSettings

LAYOUT = ("NHWC", "HWIO", "NHWC")
SHAPES = {  # images, kernel
    "depthwise": ((2, 9, 8, 6), (3, 3, 1, 6)),
    "wide depthwise": ((2, 9, 8, 6), (5, 5, 1, 6)),
    "1x1": ((2, 9, 8, 6), (1, 1, 6, 4)),
    "few positions": ((1, 3, 4, 16), (3, 3, 16, 5)),
    "many positions": ((2, 9, 8, 6), (3, 3, 6, 4)),
    "grouped": ((2, 9, 8, 6), (3, 3, 3, 4)),
}
PADDINGS = {"symmetric": None, "left": ((1, 0), (0, 1)), "SAME": "SAME", "VALID": "VALID"}


def draw(*shape, dtype=jnp.float32):
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.normal(size=shape), dtype)


def plain(x, kernel, strides, padding, groups):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=LAYOUT, feature_group_count=groups
    )


def shifted(x, kernel, strides, padding, groups):
    return shift_and_add(
        x, kernel, strides, padding, dimension_numbers=LAYOUT, feature_group_count=groups
    )


def convolutions(function, *arguments):
    """Counts the XLA convolutions of a function."""
    jaxpr = jax.make_jaxpr(function)(*arguments)
    return str(jaxpr).count("conv_general_dilated[")


# Strides and paddings with which each algorithm is tested: all for depthwise kernels, whose
# gradients have paddings of their own; one for kernels that take XLA's convolution.
ALL = tuple((stride, padding) for stride in (1, 2) for padding in PADDINGS)
SOME = (1, "symmetric"), (1, "VALID"), (2, "left"), (2, "SAME")
CHECKED = {
    "depthwise": ALL,
    "wide depthwise": (*ALL[:4], (2, "left")),
    "1x1": SOME,
    "few positions": SOME,
    "many positions": ((2, "SAME"),),
    "grouped": ((2, "SAME"),),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shifted_maps_give_the_same_sums_and_gradients(name):
    images, kernel = (draw(*shape) for shape in SHAPES[name])
    groups = images.shape[-1] // kernel.shape[2]
    cases = [
        ((stride,) * 2, PADDINGS[padding] or ((kernel.shape[0] // 2,) * 2,) * 2, groups)
        for stride, padding in CHECKED[name]
    ]

    def with_gradients(algorithm, images, kernel, options):
        out, transpose = jax.vjp(lambda x, k: algorithm(x, k, *options), images, kernel)
        return out, *transpose(jnp.sin(out))

    @jax.jit
    def outputs(images, kernel):
        return [
            [with_gradients(algorithm, images, kernel, options) for options in cases]
            for algorithm in (shifted, plain)
        ]

    for array, expected in zip(*map(jax.tree.leaves, outputs(images, kernel)), strict=True):
        assert array.shape == expected.shape
        assert helpers.relative_error(array, expected) < 1e-5
    uses_xla = name in ("many positions", "grouped")
    for options in cases:
        count = convolutions(lambda x, k, o=options: shifted(x, k, *o), images, kernel)
        assert count == uses_xla


@pytest.mark.parametrize("name", [name for name, cases in CHECKED.items() if len(cases) > 1])
def test_halves_are_summed_in_float32(name):
    """Sums and gradients are no further from the exact ones than XLA's."""
    images, kernel = (draw(*shape, dtype=jnp.bfloat16) for shape in SHAPES[name])
    options = (1, 1), "SAME", images.shape[-1] // kernel.shape[2]

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def with_gradients(algorithm, dtype):
        out, transpose = jax.vjp(
            lambda x, k: algorithm(x, k, *options), images.astype(dtype), kernel.astype(dtype)
        )
        gradient = draw(*out.shape, dtype=jnp.bfloat16).astype(dtype)
        return out, *transpose(gradient)

    outputs = (
        with_gradients(shifted, jnp.bfloat16),
        with_gradients(plain, jnp.bfloat16),
        with_gradients(plain, jnp.float32),
    )
    for array, xla, exact in zip(*outputs, strict=True):
        assert array.dtype == xla.dtype == jnp.bfloat16
        assert helpers.relative_error(array, exact) <= 2**-8
        error, xla_error = (jnp.mean(jnp.abs(x - exact)) for x in (array, xla))
        assert error <= 1.02 * xla_error


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("padding", ["symmetric", "SAME"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_max_pool_and_its_gradient_are_the_same_to_the_bit(size, padding, dtype):
    """Draws from ten values, so that many are equal, in a window and at the border."""
    images = jnp.round(draw(2, size, size, 5) * 3).astype(dtype)
    pads = ((1, 1), (1, 1))
    if padding == "SAME":
        pads = tuple(jax.lax.padtype_to_pads((size, size), (3, 3), (2, 2), padding))

    def with_gradient(pool):
        out, transpose = jax.vjp(pool, images)
        # Whole numbers, whose sums over overlapping windows do not round.
        gradient = jnp.round(draw(*out.shape) * 3).astype(dtype)
        return out, transpose(gradient)[0]

    shifted = jax.jit(lambda: with_gradient(lambda x: max_pool(x, pads)))()
    xla = jax.jit(lambda: with_gradient(lambda x: nn.max_pool(x, (3, 3), (2, 2), pads)))()
    for array, expected in zip(shifted, xla, strict=True):
        np.testing.assert_array_equal(array, expected)
    assert np.any(shifted[1] != 0)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_gradient_of_a_max_pool_arrives_whatever_it_is_fused_with(dtype, compiled):
    """The gradient compares inputs with maxima, which must have been rounded alike."""
    images, kernel = draw(4, 16, 16, 3).astype(dtype), draw(7, 7, 3, 8).astype(dtype)
    factor, gradient = draw(8), jnp.round(3 * draw(4, 8, 8, 8))
    before = (
        lambda y: (y.astype(jnp.float32) * factor.reshape(1, 1, 1, -1) + 0.3).astype(dtype),
        lambda y: jnp.sin(y) * jnp.asarray(1.3, dtype),
        lambda y: y,
    )

    def total(moves):
        y = plain(images, kernel, (1, 1), "SAME", 1)
        pooled = [
            max_pool(layer(y) + move, ((1, 1), (1, 1)))
            for layer, move in zip(before, moves, strict=True)
        ]
        return sum(jnp.sum(x.astype(jnp.float32) * gradient) for x in pooled)

    moves = [jnp.zeros((4, 16, 16, 8), dtype)] * len(before)
    gradients = (jax.jit(jax.grad(total)) if compiled else jax.grad(total))(moves)
    for each in gradients:  # whole numbers, at most four per position
        assert np.asarray(each, np.float32).sum() == np.asarray(gradient).sum()


@pytest.mark.parametrize(
    "backbone, fields",
    [
        ("resnet18", dict(stage_sizes=(1, 1, 1, 1), width=64)),  # ends with few positions
        ("resnet50", {}),
        ("resnet50_same", {}),
        ("efficientnet_b0", {}),
        ("mobilenetv2", {}),
        ("xcit_tiny_12_p16", {}),
    ],
)
def test_networks_compute_the_same(backbone, fields):
    assert not models.backbone(backbone).compute.shift_and_add  # exports have XLA's layers
    encoder = Encoder(helpers.cut_backbone(backbone, **fields), Identity())
    images = draw(2, 64, 64, 3)
    variables = encoder.create(0, 64)
    outputs = {}
    for choice in ("on", "off"):
        fast = models.FastSettings(shifts=choice)
        current = encoder.with_compute(encoder.compute.for_inference(fast))
        assert current.compute.shift_and_add == (choice == "on")
        apply = functools.partial(current.apply, variables, norm="running")
        outputs[choice] = jax.jit(apply)(images).features, convolutions(apply, images)
    assert helpers.relative_error(outputs["on"][0], outputs["off"][0]) < 1e-4
    assert outputs["on"][1] < outputs["off"][1]


@pytest.mark.parametrize("choice, shifts", [("on", True), ("off", False), ("auto", True)])
def test_the_config_chooses_and_a_cpu_takes_them(choice, shifts):
    config = helpers.smoke_config("moco_v2", **{"fast.shifts": choice})
    for network in helpers.build_method(config).networks.values():
        assert network.encoder.compute.shift_and_add == shifts
    untrained = features.untrained(experiment.parse(config))
    assert untrained.encoder.compute.shift_and_add == shifts
    del config.fast["shifts"]  # as in the config of a run of an earlier version
    stored = typed.parse(RunSettings, config, stored=True)
    assert features.untrained(stored).encoder.compute.shift_and_add


def test_multiply_adds_are_those_of_the_plain_network():
    encoder = Encoder(helpers.cut_backbone("mobilenetv2"), Identity())
    shifted = encoder.with_compute(models.Compute(shift_and_add=True))
    assert cost.multiply_adds(shifted, 224) == cost.multiply_adds(encoder, 224)
