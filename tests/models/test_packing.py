"""Maps with columns side by side in their channels: the same network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax import methods, models
from disco_jax.errors import UserError
from disco_jax.models.encoder import Encoder, Network, encode
from disco_jax.models.heads import ProjectionHead
from disco_jax.models.layers.folding import still
from disco_jax.models.layers.initializers import he_fan_out
from disco_jax.models.layers.packing import ColumnConv, packed, unpacked

LAYOUT = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
    "columns, side, stride, padding, depthwise",
    [(2, 3, 2, 1, False), (2, 5, 1, 2, True), (4, 3, 2, 1, False), (4, 3, 2, "SAME", False),
     (4, 5, 1, 2, True), (4, 3, 1, ((1, 1), (1, 1)), True), (4, 1, 1, 0, False),
     (4, 3, 2, ((0, 1), (0, 1)), False)],
)  # fmt: skip
def test_a_convolution_of_packed_maps_is_the_plain_one(columns, side, stride, padding, depthwise):
    images = jax.random.normal(jax.random.key(0), (2, 8, 16, 6))
    features = 6 if depthwise else 5
    layer = ColumnConv(features, side, stride, columns, padding, depthwise, he_fan_out, jnp.float32)
    rows = packed(images, stride * columns)
    shape = jax.eval_shape(layer.init, jax.random.key(1), rows)["params"]["kernel"].shape
    assert shape == (side, side, 1 if depthwise else 6, features)
    kernel = he_fan_out(jax.random.key(1), shape)
    pads = [(padding, padding)] * 2 if isinstance(padding, int) else padding

    def plain(kernel):
        return jax.lax.conv_general_dilated(
            images, kernel, (stride, stride), pads, dimension_numbers=LAYOUT,
            feature_group_count=6 if depthwise else 1,
        )  # fmt: skip

    def ours(kernel):
        return unpacked(layer.apply({"params": {"kernel": kernel}}, rows), columns)

    def halved(kernel):
        made = layer.clone(dtype=jnp.bfloat16).apply({"params": {"kernel": kernel}}, rows)
        return unpacked(made, columns)

    @jax.jit
    def found(kernel):
        gradients = [jax.grad(lambda k, f=f: jnp.sum(f(k) ** 2))(kernel) for f in (ours, plain)]
        return ours(kernel), plain(kernel), halved(kernel), gradients

    mine, theirs, half, gradients = found(kernel)
    assert helpers.relative_error(mine, theirs) < 1e-5
    assert half.dtype == jnp.bfloat16
    assert helpers.relative_error(half.astype(jnp.float32), theirs) < 0.02
    assert helpers.relative_error(*gradients) < 1e-5


def network(columns, norm="local", backbone="efficientnet_b0", group=0, **fields):
    """A network of which every stage is short: packing ends with the third, or before."""
    made = helpers.cut_backbone(backbone, norm_group=group, **fields)
    encoder = Encoder(made, ProjectionHead(8, 8))
    assert encoder.backbone.columns == 1
    return Network(models.packed_columns(encoder) if columns > 1 else encoder, norm)


def compiled(network, variables, images, maps=False):
    """What `encode` gives of images: `Encoded` and the new statistics."""

    @jax.jit
    def run(variables, images):
        out, stats = encode(network, variables, {0: images}, (0,), jax.random.key(0), maps=maps)
        return out[0], stats

    return run(variables, images)


@pytest.mark.parametrize(
    "backbone, stem",
    [
        ("efficientnet_b0", "imagenet"),
        ("mobilenetv2", "small"),  # what it has beside is MobileNetV3's
        ("mobilenetv3_large", "imagenet"),
        ("resnet18", "imagenet"),
        ("resnet18", "small"),
        ("resnet50", "imagenet"),
    ],
)
def test_a_network_that_packs_columns_has_the_same_gradients(backbone, stem):
    """On stored statistics: a batch's own, of maps of one pixel, turn rounding into signs."""
    plain, ours = (network(columns, "running", backbone, stem=stem) for columns in (1, 4))
    assert ours.encoder.backbone.columns > 1
    variables = plain.encoder.create(0, 32)
    same = jax.tree.map(np.array_equal, variables, ours.encoder.create(0, 32))
    assert all(jax.tree.leaves(same))
    images = {0: jax.random.normal(jax.random.key(1), (2, 32, 32, 3))}

    def gradients(network):
        def loss(params):
            current = {**variables, "params": params}
            out, _ = encode(network, current, images, (0,), jax.random.key(0))
            return jnp.sum(jnp.square(out[0].embedding))

        return jax.tree.leaves(jax.jit(jax.grad(loss))(variables["params"]))

    for theirs, mine in zip(*map(gradients, (plain, ours)), strict=True):
        assert helpers.relative_error(mine, theirs) < 1e-3


def test_a_channels_columns_share_their_statistics():
    """Of groups of two images, in the padding of another code base."""
    plain, ours = (network(columns, "local", "efficientnet_b0_seed", 2) for columns in (1, 4))
    variables = plain.encoder.create(0, 32)
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    made = [compiled(one, variables, images)[1] for one in (plain, ours)]
    for name in ("stem_bn", "block0_0"):
        pairs = zip(*(jax.tree.leaves(stats["backbone"][name]) for stats in made), strict=True)
        assert all(helpers.relative_error(mine, theirs) < 1e-5 for theirs, mine in pairs)


def test_images_of_another_width_are_not_packed_and_stored_statistics_fold():
    plain, ours = network(1, "running"), network(4, "running")
    variables = jax.tree.map(np.asarray, dict(plain.encoder.create(0, 32)))
    for side in (30, 32):
        images = jax.random.normal(jax.random.key(1), (2, side, side, 3))
        made = [
            compiled(one, own, images)[0].embedding
            for one, own in (
                (plain, variables),
                (ours, variables),
                (ours, still(ours, variables, 32)),
            )
        ]
        assert helpers.relative_error(made[1], made[0]) < 1e-4
        assert helpers.relative_error(made[2], made[0]) < 1e-4


def test_columns_are_packed_where_the_config_asks():
    found = {}
    for columns in ("on", "off", "auto"):
        changes = {"student.backbone": "efficientnet_b0", "student.width": 0}
        config = helpers.smoke_config("moco_v2", **changes, **{"fast.columns": columns})
        found[columns] = methods.build(config).networks["student"].encoder.backbone.columns
    assert found == {"on": 4, "off": 1, "auto": 1}


def test_statistics_come_from_factors_where_the_config_asks():
    """In networks without a gradient; weights stay as they are."""
    found = {}
    for way in ("on", "off", "auto"):
        changes = {"student.backbone": "resnet50", "student.width": 0, "fast.statistics": way}
        networks = methods.build(helpers.smoke_config("moco_v2", **changes)).networks
        assert not networks["student"].encoder.backbone.by_product
        found[way] = networks["momentum"].encoder.backbone.by_product
    assert found == {"on": True, "off": False, "auto": False}


@pytest.mark.parametrize("setting", ["columns", "statistics", "shifts"])
def test_a_choice_that_is_none_is_named(setting):
    config = helpers.smoke_config("moco_v2", **{f"fast.{setting}": "yes"})
    with pytest.raises(UserError, match=rf"config\.fast\.{setting}='yes'"):
        methods.build(config)


@pytest.mark.parametrize("backbone", ["efficientnet_b0", "resnet18"])
def test_maps_that_are_read_are_not_packed(backbone):
    plain, ours = (network(columns, "running", backbone) for columns in (1, 4))
    variables = plain.encoder.create(0, 64)
    images = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))
    theirs, mine = (compiled(one, variables, images, True)[0].maps for one in (plain, ours))
    assert [x.shape for x in mine] == [x.shape for x in theirs]
    assert all(
        helpers.relative_error(ours, plain) < 1e-4 for plain, ours in zip(theirs, mine, strict=True)
    )
