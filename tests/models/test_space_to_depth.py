"""A first convolution that takes columns by pairs is the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax import methods
from disco_jax.models.layers.space_to_depth import by_pairs

LAYOUT = ("NHWC", "HWIO", "NHWC")


def strides_of(function, *arguments):
    """Of the only convolution in a function."""
    traced = jax.make_jaxpr(function)(*arguments)
    found = [e for e in traced.eqns if e.primitive.name == "conv_general_dilated"]
    assert len(found) == 1
    return found[0].params["window_strides"]


@pytest.mark.parametrize("side", [3, 5, 7])
@pytest.mark.parametrize("height, width", [(12, 16), (13, 10), (9, 9)])
def test_pairs_of_columns_give_the_same_sums(height, width, side):
    """Whatever the padding; the gradient of the kernel too."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(2, height, width, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(side, side, 3, 4)), jnp.float32)
    paddings = [[(side // 2, side // 2)] * 2, [(0, 1), (1, 0)], "SAME", "VALID"]
    if width % 2:
        paddings = paddings[:1]  # the plain convolution

    def convolved(way, pads, kernel):
        return way(images, kernel, (2, 2), pads, dimension_numbers=LAYOUT)

    def both(way, kernel):
        """The results for every padding, and gradients."""
        made = [functools.partial(convolved, way, pads) for pads in paddings]
        return [(f(kernel), jax.grad(lambda k, f=f: jnp.sum(f(k) ** 2))(kernel)) for f in made]

    for pads in paddings:
        paired = functools.partial(convolved, by_pairs, pads)
        assert strides_of(paired, kernel) == ((2, 2) if width % 2 else (2, 1))
    run = jax.jit(lambda k: [both(way, k) for way in (by_pairs, jax.lax.conv_general_dilated)])
    for ours, theirs in zip(*map(jax.tree.leaves, run(kernel)), strict=True):
        assert ours.shape == theirs.shape
        assert helpers.relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_b0", "mobilenetv3_large"])
def test_the_stem_is_switched_by_the_config_and_keeps_its_parameters(backbone):
    found = {}
    for stem in (True, False):
        changes = {"student.backbone": backbone, "student.width": 0, "student.stem": "imagenet"}
        config = helpers.smoke_config("moco_v2", **changes, **{"fast.stem": stem})
        encoder = methods.build(config).networks["student"].encoder
        assert encoder.backbone.pairs == stem
        found[stem] = jax.eval_shape(lambda encoder=encoder: encoder.create(0, 32))
    assert found[True] == found[False]
    name = "conv1" if backbone == "resnet18" else "stem_conv"
    side = 7 if backbone == "resnet18" else 3
    assert found[True]["params"]["backbone"][name]["kernel"].shape[:3] == (side, side, 3)
