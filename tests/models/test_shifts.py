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
from disco_jax.models.encoder import Encoder
from disco_jax.models.heads import Identity
from disco_jax.models.layers.shifts import by_shifts, max_pool

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


# The ways that convolutions take, and under which strides and paddings each is looked at: all
# of the depthwise ones, whose gradients pad by themselves; XLA's own stay as they are.
EVERYWHERE = tuple((stride, padding) for stride in (1, 2) for padding in PADDINGS)
ALIKE = (1, "symmetric"), (1, "VALID"), (2, "left"), (2, "SAME")
CHECKED = {
    "depthwise": EVERYWHERE,
    "wide depthwise": (*EVERYWHERE[:4], (2, "left")),
    "1x1": ALIKE,
    "few places": ALIKE,
    "many places": ((2, "SAME"),),
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

    def both(way, images, kernel, rest):
        made, back = jax.vjp(lambda x, k: way(x, k, *rest), images, kernel)
        return made, *back(jnp.sin(made))

    @jax.jit
    def found(images, kernel):
        return [[both(way, images, kernel, rest) for rest in cases] for way in (shifted, plain)]

    for ours, theirs in zip(*map(jax.tree.leaves, found(images, kernel)), strict=True):
        assert ours.shape == theirs.shape
        assert helpers.relative_error(ours, theirs) < 1e-5
    kept = name in ("many places", "grouped")
    for rest in cases:
        assert convolutions(lambda x, k, rest=rest: shifted(x, k, *rest), images, kernel) == kept


@pytest.mark.parametrize("name", [name for name, cases in CHECKED.items() if len(cases) > 1])
def test_halves_are_summed_in_float32(name):
    """No further from the exact sums and gradients than with XLA's own convolution."""
    images, kernel = (draw(*shape, dtype=jnp.bfloat16) for shape in SHAPES[name])
    rest = (1, 1), "SAME", images.shape[-1] // kernel.shape[2]

    @functools.partial(jax.jit, static_argnums=(0, 1))
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

    def found(pool):
        made, back = jax.vjp(pool, images)
        # Whole numbers: sums of overlapping windows do not round.
        gradient = jnp.round(draw(*made.shape) * 3).astype(dtype)
        return made, back(gradient)[0]

    ours = jax.jit(lambda: found(lambda x: max_pool(x, pads)))()
    theirs = jax.jit(lambda: found(lambda x: nn.max_pool(x, (3, 3), (2, 2), pads)))()
    for mine, its in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, its)
    assert np.any(ours[1] != 0)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_gradient_of_a_max_pool_arrives_whatever_it_is_fused_with(dtype, compiled):
    """It finds the largest value by comparing: what is compared must have been rounded alike."""
    images, kernel = draw(4, 16, 16, 3).astype(dtype), draw(7, 7, 3, 8).astype(dtype)
    factor, gradient = draw(8), jnp.round(3 * draw(4, 8, 8, 8))
    before = (
        lambda y: (y.astype(jnp.float32) * factor.reshape(1, 1, 1, -1) + 0.3).astype(dtype),
        lambda y: jnp.sin(y) * jnp.asarray(1.3, dtype),
        lambda y: y,
    )

    def total(moves):
        y = plain(images, kernel, (1, 1), "SAME", 1)
        made = [
            max_pool(layer(y) + move, ((1, 1), (1, 1)))
            for layer, move in zip(before, moves, strict=True)
        ]
        return sum(jnp.sum(x.astype(jnp.float32) * gradient) for x in made)

    moves = [jnp.zeros((4, 16, 16, 8), dtype)] * len(before)
    found = (jax.jit(jax.grad(total)) if compiled else jax.grad(total))(moves)
    for each in found:  # whole numbers, at most four on a place
        assert np.asarray(each, np.float32).sum() == np.asarray(gradient).sum()


@pytest.mark.parametrize(
    "backbone, fields",
    [
        ("resnet18", dict(stage_sizes=(1, 1, 1, 1), width=64)),  # with few places in the end
        ("resnet50", {}),
        ("resnet50_same", {}),
        ("efficientnet_b0", {}),
        ("mobilenetv2", {}),
        ("xcit_tiny_12_p16", {}),
    ],
)
def test_networks_compute_the_same(backbone, fields):
    assert not models.backbone(backbone).backbone.shifts  # an export has the layers as they are
    encoder = Encoder(helpers.cut_backbone(backbone, **fields), Identity())
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
    config = helpers.smoke_config("moco_v2", **{"fast.shifts": choice})
    for network in methods.build(config).networks.values():
        assert network.encoder.backbone.shifts == shifts
    assert features.untrained(config).encoder.backbone.shifts == shifts
    del config.fast["shifts"]  # as in the config of an earlier version's run
    assert features.untrained(config).encoder.backbone.shifts


def test_multiply_adds_are_those_of_the_plain_network():
    encoder = Encoder(helpers.cut_backbone("mobilenetv2"), Identity())
    quick = models.by_shifts(encoder, {"fast": {"shifts": "on"}})
    assert cost.multiply_adds(quick, 224) == cost.multiply_adds(encoder, 224)
