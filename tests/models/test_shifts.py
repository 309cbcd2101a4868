"""Convolutions and max-pools out of shifted maps are the plain ones."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax import methods, models
from disco_jax.evaluate import cost, features
from disco_jax.models.shifts import by_shifts, max_pool

LAYOUT = ("NHWC", "HWIO", "NHWC")
SHAPES = {  # images, kernel
    "depthwise": ((2, 9, 8, 6), (3, 3, 1, 6)),
    "wide depthwise": ((2, 9, 8, 6), (5, 5, 1, 6)),
    "1x1": ((2, 9, 8, 6), (1, 1, 6, 4)),
    "few places": ((1, 3, 4, 16), (3, 3, 16, 5)),
    "many places": ((2, 9, 8, 6), (3, 3, 6, 4)),
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
    return by_shifts(
        x, kernel, strides, padding, dimension_numbers=LAYOUT, feature_group_count=groups
    )


def convolutions(function, *arguments):
    """How many XLA convolutions a function has."""
    traced = jax.make_jaxpr(function)(*arguments)
    return str(traced).count("conv_general_dilated[")


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_shifted_maps_give_the_same_sums_and_gradients(name, stride, padding):
    images, kernel = (draw(*shape) for shape in SHAPES[name])
    pads = PADDINGS[padding] or ((kernel.shape[0] // 2,) * 2,) * 2
    groups = images.shape[-1] // kernel.shape[2]
    rest = (stride, stride), pads, groups

    def both(way):
        made, back = jax.vjp(lambda x, k: way(x, k, *rest), images, kernel)
        return made, *back(jnp.sin(made))

    for ours, theirs in zip(both(shifted), both(plain), strict=True):
        assert ours.shape == theirs.shape
        assert helpers.relative_error(ours, theirs) < 1e-5
    kept = name in ("many places", "grouped")
    assert convolutions(lambda x, k: shifted(x, k, *rest), images, kernel) == kept


@pytest.mark.parametrize("name", SHAPES)
def test_halves_are_summed_in_float32(name):
    """No further from the exact sums and gradients than with XLA's own convolution."""
    images, kernel = (draw(*shape, dtype=jnp.bfloat16) for shape in SHAPES[name])
    rest = (1, 1), "SAME", images.shape[-1] // kernel.shape[2]

    def both(way, dtype):
        made, back = jax.vjp(
            lambda x, k: way(x, k, *rest), images.astype(dtype), kernel.astype(dtype)
        )
        gradient = draw(*made.shape, dtype=jnp.bfloat16).astype(dtype)
        return made, *back(gradient)

    ways = both(shifted, jnp.bfloat16), both(plain, jnp.bfloat16), both(plain, jnp.float32)
    for ours, theirs, exact in zip(*ways, strict=True):
        assert ours.dtype == theirs.dtype == jnp.bfloat16
        assert helpers.relative_error(ours, exact) <= 2**-8
        missed = [jnp.mean(jnp.abs(made - exact)) for made in (ours, theirs)]
        assert missed[0] <= 1.02 * missed[1]


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("padding", ["symmetric", "SAME"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_max_pool_and_its_gradient_are_the_same_to_the_bit(size, padding, dtype):
    """Of ten values many are equal, in a window and beside the border."""
    images = jnp.round(draw(2, size, size, 5) * 3).astype(dtype)
    pads = ((1, 1), (1, 1))
    if padding == "SAME":
        pads = tuple(jax.lax.padtype_to_pads((size, size), (3, 3), (2, 2), padding))
    made, back = jax.vjp(lambda x: max_pool(x, pads), images)
    theirs, their_back = jax.vjp(lambda x: nn.max_pool(x, (3, 3), (2, 2), pads), images)
    # Whole numbers: sums of overlapping windows do not round.
    gradient = jnp.round(draw(*made.shape) * 3).astype(dtype)
    np.testing.assert_array_equal(made, theirs)
    np.testing.assert_array_equal(back(gradient)[0], their_back(gradient)[0])
    assert np.any(back(gradient)[0] != 0)


@pytest.mark.parametrize(
    "backbone",
    [
        "resnet18", "resnet50", "resnet50_same", "efficientnet_b0", "mobilenetv2",
        "xcit_tiny_12_p16",
    ],
)  # fmt: skip
def test_networks_compute_the_same(backbone):
    encoder = models.backbone(backbone)
    assert not encoder.backbone.shifts  # what is exported has the layers as they are
    images = draw(2, 64, 64, 3)
    variables = encoder.create(0, 64)
    found = {}
    for choice in ("on", "off"):
        one = models.by_shifts(encoder, {"fast": {"shifts": choice}})
        assert one.backbone.shifts == (choice == "on")
        shapes = jax.eval_shape(lambda one=one: one.create(0, 64))
        assert jax.tree.structure(shapes) == jax.tree.structure(variables)
        apply = functools.partial(one.apply, variables, norm="running")
        found[choice] = jax.jit(apply)(images).features, convolutions(apply, images)
    assert helpers.relative_error(found["on"][0], found["off"][0]) < 1e-4
    assert found["on"][1] < found["off"][1]


@pytest.mark.parametrize("choice, shifts", [("on", True), ("off", False), ("auto", True)])
def test_the_config_chooses_and_a_cpu_takes_them(choice, shifts):
    changes = {"student.backbone": "efficientnet_b0", "student.width": 0}
    config = helpers.smoke_config("moco_v2", **changes, **{"fast.shifts": choice})
    for network in methods.build(config).networks.values():
        assert network.encoder.backbone.shifts == shifts
    assert features.untrained(config).encoder.backbone.shifts == shifts
    del config.fast["shifts"]  # as in the config of an earlier version's run
    assert features.untrained(config).encoder.backbone.shifts


def test_multiply_adds_are_those_of_the_plain_network():
    encoder = models.backbone("mobilenetv2")
    quick = models.by_shifts(encoder, {"fast": {"shifts": "on"}})
    assert cost.multiply_adds(quick, 224) == cost.multiply_adds(encoder, 224)
