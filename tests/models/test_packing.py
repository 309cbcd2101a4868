"""Networks whose early layers pack columns into channels compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax.errors import UserError
from disco_jax.models import Compute
from disco_jax.models.encoder import Encoder, Network, encode
from disco_jax.models.heads import ProjectionHead
from disco_jax.models.layers.feature_maps import FeatureMap
from disco_jax.models.layers.folding import fold_batch_norm
from disco_jax.models.layers.initializers import he_fan_out
from disco_jax.models.layers.packing import PackedConv, pack_width, unpack_width

LAYOUT = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
    "packing, side, stride, padding, depthwise",
    [(2, 3, 2, 1, False), (2, 5, 1, 2, True), (4, 3, 2, 1, False), (4, 3, 2, "SAME", False),
     (4, 5, 1, 2, True), (4, 3, 1, ((1, 1), (1, 1)), True), (4, 1, 1, 0, False),
     (4, 3, 2, ((0, 1), (0, 1)), False)],
)  # fmt: skip
def test_a_convolution_of_packed_maps_is_the_plain_one(packing, side, stride, padding, depthwise):
    images = jax.random.normal(jax.random.key(0), (2, 8, 16, 6))
    features = 6 if depthwise else 5
    layer = PackedConv(features, side, stride, packing, padding, depthwise, he_fan_out, jnp.float32)
    inputs = pack_width(images, stride * packing)
    shape = jax.eval_shape(layer.init, jax.random.key(1), inputs)["params"]["kernel"].shape
    assert shape == (side, side, 1 if depthwise else 6, features)
    kernel = he_fan_out(jax.random.key(1), shape)
    pads = [(padding, padding)] * 2 if isinstance(padding, int) else padding

    def plain(kernel):
        return jax.lax.conv_general_dilated(
            images, kernel, (stride, stride), pads, dimension_numbers=LAYOUT,
            feature_group_count=6 if depthwise else 1,
        )  # fmt: skip

    def packed(kernel):
        return unpack_width(layer.apply({"params": {"kernel": kernel}}, inputs), packing)

    def packed_bfloat16(kernel):
        half = layer.clone(dtype=jnp.bfloat16)
        return unpack_width(half.apply({"params": {"kernel": kernel}}, inputs), packing)

    @jax.jit
    def outputs_and_gradients(kernel):
        gradients = [jax.grad(lambda k, f=f: jnp.sum(f(k) ** 2))(kernel) for f in (packed, plain)]
        return packed(kernel), plain(kernel), packed_bfloat16(kernel), gradients

    output, expected, half, gradients = outputs_and_gradients(kernel)
    assert helpers.relative_error(output, expected) < 1e-5
    assert half.dtype == jnp.bfloat16
    assert helpers.relative_error(half.astype(jnp.float32), expected) < 0.02
    assert helpers.relative_error(*gradients) < 1e-5


def test_maps_of_different_layouts_are_added_unpacked():
    x = jnp.arange(2 * 2 * 4 * 3.0).reshape(2, 2, 4, 3)
    packed = FeatureMap(pack_width(x, 2), 2)
    both = packed + FeatureMap(x)
    assert both.width_packing == 1 and packed.channels == 3
    np.testing.assert_array_equal(both.x, 2 * x)
    np.testing.assert_array_equal((packed + packed).unpacked(), 2 * x)


def network(packed, norm="local", backbone="efficientnet_b0", group=0, **fields):
    """Returns a network with short stages, in which packing ends with the third or earlier."""
    compute = Compute(norm_group=group, width_packing=packed)
    if backbone.startswith("efficientnet"):
        fields["repeats"] = (1, 1, 1, 0, 0, 0, 0)  # MobileNetV3 has a packed map that is added
    short = helpers.cut_backbone(backbone, compute=compute, **fields)
    return Network(Encoder(short, ProjectionHead(8, 8)), norm)


def packed_modules(network, size=32):
    """Returns the number of packed convolutions of a network."""
    modules = []

    def watch(call, args, kwargs, context):
        modules.append(type(context.module))
        return call(*args, **kwargs)

    with helpers.nn.intercept_methods(watch):
        jax.eval_shape(lambda: network.encoder.create(0, size))
    return modules.count(PackedConv)


def encoded(network, variables, images, maps=False):
    """Returns `Encoded` and the new statistics of one view, compiled."""

    @jax.jit
    def run(variables, images):
        out, stats = encode(network, variables, {0: images}, (0,), jax.random.key(0), maps=maps)
        return out[0], stats

    return run(variables, images)


@pytest.mark.parametrize(
    "backbone, stem",
    [
        ("efficientnet_b0", "imagenet"),
        ("mobilenetv2", "small"),  # its other layers are those of MobileNetV3
        ("mobilenetv3_large", "imagenet"),
        ("resnet18", "imagenet"),
        ("resnet18", "small"),
        ("resnet50", "imagenet"),
    ],
)
def test_a_network_that_packs_columns_has_the_same_gradients(backbone, stem):
    """Uses stored statistics: batch statistics of maps of one pixel turn rounding into signs."""
    plain, packed = (network(on, "running", backbone, stem=stem) for on in (False, True))
    assert packed_modules(plain) == 0 < packed_modules(packed)
    variables = plain.encoder.create(0, 32)
    same = jax.tree.map(np.array_equal, variables, packed.encoder.create(0, 32))
    assert all(jax.tree.leaves(same))
    images = {0: jax.random.normal(jax.random.key(1), (2, 32, 32, 3))}

    def gradients(network):
        def loss(params):
            current = {**variables, "params": params}
            out, _ = encode(network, current, images, (0,), jax.random.key(0))
            return jnp.sum(jnp.square(out[0].embedding))

        return jax.tree.leaves(jax.jit(jax.grad(loss))(variables["params"]))

    for expected, gradient in zip(*map(gradients, (plain, packed)), strict=True):
        assert helpers.relative_error(gradient, expected) < 1e-3


def test_a_channels_columns_share_their_statistics():
    """Uses groups of two images and the padding of another code base."""
    networks = [network(on, "local", "efficientnet_b0_seed", 2) for on in (False, True)]
    variables = networks[0].encoder.create(0, 32)
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    plain, packed = (encoded(one, variables, images)[1]["backbone"] for one in networks)
    for name in ("stem_bn", "block0_0"):
        pairs = zip(jax.tree.leaves(plain[name]), jax.tree.leaves(packed[name]), strict=True)
        assert all(helpers.relative_error(stats, expected) < 1e-5 for expected, stats in pairs)


def test_images_of_another_width_are_not_packed_and_stored_statistics_fold():
    plain, packed = network(False, "running"), network(True, "running")
    assert packed_modules(packed, 30) == 0
    variables = jax.tree.map(np.asarray, dict(plain.encoder.create(0, 32)))
    folded = fold_batch_norm(packed, variables, 32)
    for side in (30, 32):
        images = jax.random.normal(jax.random.key(1), (2, side, side, 3))
        expected = encoded(plain, variables, images)[0].embedding
        for current in (variables, folded):
            embedding = encoded(packed, current, images)[0].embedding
            assert helpers.relative_error(embedding, expected) < 1e-4


@pytest.mark.parametrize("choice, packs", [("on", True), ("off", False), ("auto", False)])
def test_columns_are_packed_where_the_config_asks(choice, packs):
    changes = {"student.backbone": "efficientnet_b0", "student.width": 0, "fast.columns": choice}
    student = helpers.build_method(helpers.smoke_config("moco_v2", **changes)).networks["student"]
    assert student.encoder.compute.width_packing == packs
    assert (packed_modules(student) > 0) == packs


@pytest.mark.parametrize("choice, used", [("on", True), ("off", False), ("auto", False)])
def test_statistics_come_from_inputs_where_the_config_asks(choice, used):
    """Only networks without a gradient use them."""
    changes = {"student.backbone": "resnet50", "student.width": 0, "fast.statistics": choice}
    networks = helpers.build_method(helpers.smoke_config("moco_v2", **changes)).networks
    assert not networks["student"].encoder.compute.stats_from_input
    assert networks["momentum"].encoder.compute.stats_from_input == used


@pytest.mark.parametrize("setting", ["columns", "statistics", "shifts"])
def test_a_choice_that_is_none_is_named(setting):
    config = helpers.smoke_config("moco_v2", **{f"fast.{setting}": "yes"})
    with pytest.raises(UserError, match=rf"config\.fast\.{setting}='yes'"):
        helpers.build_method(config)


@pytest.mark.parametrize("backbone", ["efficientnet_b0", "resnet18"])
def test_maps_that_are_read_are_not_packed(backbone):
    networks = [network(on, "running", backbone) for on in (False, True)]
    variables = networks[0].encoder.create(0, 64)
    images = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))
    plain, packed = (encoded(one, variables, images, True)[0].maps for one in networks)
    assert [x.shape for x in packed] == [x.shape for x in plain]
    for expected, x in zip(plain, packed, strict=True):
        assert helpers.relative_error(x, expected) < 1e-4
