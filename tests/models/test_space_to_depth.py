"""A first convolution on pairs of columns is the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax.models.layers.space_to_depth import space_to_depth_conv

LAYOUT = ("NHWC", "HWIO", "NHWC")


def strides_of(function, *arguments):
    """Returns the strides of the only convolution of a function."""
    jaxpr = jax.make_jaxpr(function)(*arguments)
    (conv,) = (e for e in jaxpr.eqns if e.primitive.name == "conv_general_dilated")
    return conv.params["window_strides"]


@pytest.mark.parametrize("side", [3, 5, 7])
@pytest.mark.parametrize("height, width", [(12, 16), (13, 10), (9, 9)])
def test_pairs_of_columns_give_the_same_sums(height, width, side):
    """Compares outputs and kernel gradients under every padding."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(2, height, width, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(side, side, 3, 4)), jnp.float32)
    paddings = [[(side // 2, side // 2)] * 2, [(0, 1), (1, 0)], "SAME", "VALID"]
    if width % 2:
        paddings = paddings[:1]  # odd widths take the plain convolution

    def convolve(algorithm, pads, kernel):
        return algorithm(images, kernel, (2, 2), pads, dimension_numbers=LAYOUT)

    def outputs_and_gradients(algorithm, kernel):
        """Returns (output, gradient) for every padding."""
        functions = [functools.partial(convolve, algorithm, pads) for pads in paddings]
        return [(f(kernel), jax.grad(lambda k, f=f: jnp.sum(f(k) ** 2))(kernel)) for f in functions]

    for pads in paddings:
        paired = functools.partial(convolve, space_to_depth_conv, pads)
        assert strides_of(paired, kernel) == ((2, 2) if width % 2 else (2, 1))
    algorithms = space_to_depth_conv, jax.lax.conv_general_dilated
    run = jax.jit(lambda kernel: [outputs_and_gradients(way, kernel) for way in algorithms])
    for array, expected in zip(*map(jax.tree.leaves, run(kernel)), strict=True):
        assert array.shape == expected.shape
        assert helpers.relative_error(array, expected) < 1e-5


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_b0", "mobilenetv3_large"])
def test_the_stem_is_switched_by_the_config_and_keeps_its_parameters(backbone):
    shapes = {}
    for stem in (True, False):
        changes = {"student.backbone": backbone, "student.width": 0, "student.stem": "imagenet"}
        config = helpers.smoke_config("moco_v2", **changes, **{"fast.stem": stem})
        encoder = helpers.build_method(config).networks["student"].encoder
        assert encoder.compute.fast_stem == stem
        shapes[stem] = jax.eval_shape(lambda encoder=encoder: encoder.create(0, 32))
    assert shapes[True] == shapes[False]
    name = "conv1" if backbone == "resnet18" else "stem_conv"
    side = 7 if backbone == "resnet18" else 3
    assert shapes[True]["params"]["backbone"][name]["kernel"].shape[:3] == (side, side, 3)
