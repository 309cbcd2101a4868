"""All networks: parameter counts of the papers, shapes, options, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax import models
from disco_jax.errors import UserError
from disco_jax.models import heads
from disco_jax.models.backbones import efficientnet, inverted
from disco_jax.models.encoder import Network, encode
from disco_jax.models.layers.dropout import drop_path
from disco_jax.ops.collectives import AXIS

M = 2**20


def build(backbone, compute=models.Compute(), **fields):  # noqa: B008, as it is frozen
    return models.build_encoder(helpers.encoder_spec(backbone, **fields), compute)


def shapes(encoder, size, norm="running"):
    variables = jax.eval_shape(lambda: encoder.create(0, size))
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    out = jax.eval_shape(
        lambda v, x: encoder.apply(v, x, norm=norm, mutable=["batch_stats"])[0], variables, images
    )
    return variables, out


# DisCo's table 1 and RETRO's table 5; M is 2^20 there.
MILLIONS = {
    "resnet18": 10.66,
    "resnet34": 20.30,
    "efficientnet_b0": 3.82,
    "efficientnet_b0_seed": 3.82,
    "efficientnet_b1": 6.21,
    "mobilenetv3_large": 4.01,
    "mobilenetv3_large_seed": 4.01,
    "resnet50": 22.42,
    "resnet101": 40.53,
    "resnet152": 55.45,
}


@pytest.mark.parametrize("backbone", MILLIONS)
def test_parameters_are_as_many_as_the_papers_count(backbone):
    assert models.parameters(build(backbone)) / M == pytest.approx(MILLIONS[backbone], abs=5e-3)


def test_swavs_wide_resnet_has_as_many_as_its_release():
    """The release has 94 million parameters, counted in 10^6."""
    assert models.parameters(build("resnet50w2")) / 1e6 == pytest.approx(93.9, abs=0.05)


# DisCo's width sweep (networks of figure 9): parameters of encoder and head by hidden width.
SWEEP = {
    "resnet18": (10.72, 10.97, 11.28, 11.44, 11.91),
    "resnet34": (20.36, 20.61, 20.92, 21.08, 21.55),
    "mobilenetv3_large": (4.16, 4.70, 5.38, 5.73, 6.76),
}


@pytest.mark.parametrize("backbone", SWEEP)
def test_head_widths_give_the_parameters_of_the_width_sweep(backbone):
    counts = [
        models.parameters(build(backbone, hidden=hidden), ("backbone", "head")) / M
        for hidden in (0, 512, 1024, 1280, 2048)
    ]
    assert counts == pytest.approx(SWEEP[backbone], abs=6e-3)


# RETRO's table 5: the backbone and the adapter are learned; the head is the teacher's.
RETRO = {
    "efficientnet_b0": 6.32,
    "efficientnet_b1": 8.71,
    "mobilenetv3_large": 6.51,
    "resnet18": 11.66,
    "resnet34": 21.30,
}


@pytest.mark.parametrize("backbone", RETRO)
def test_retros_adapter_has_the_papers_size(backbone):
    encoder = build(backbone, adapter=2048, hidden=2048)
    count = models.parameters(encoder, ("backbone", "adapter"))
    assert count / M == pytest.approx(RETRO[backbone], abs=5.5e-3)
    assert encoder.adapter.width == 2048


@pytest.mark.parametrize("backbone", helpers.KINDS)
def test_every_network_computes_in_bfloat16_and_keeps_float32_outside(backbone):
    encoder = build(backbone, models.Compute(jnp.bfloat16), hidden=32, dim=16)
    variables, out = shapes(encoder, 64, "local")
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert out.features.dtype == out.embedding.dtype == jnp.float32
    assert out.features.shape == (2, encoder.backbone.out_features)
    assert out.embedding.shape == (2, 16)


@pytest.mark.parametrize(
    "backbone, strides",
    [("resnet18", 8), ("efficientnet_b0", 8), ("mobilenetv2", 8), ("mobilenetv3_large", 8)],
)
def test_small_stems_spare_a_quarter_of_the_reduction(backbone, strides):
    """32 px become a map of 4 px per side; with the ImageNet stem it would have 1."""
    encoder = build(backbone, stem="small")
    images = jnp.zeros((1, 32, 32, 3))

    def run():
        variables = encoder.create(0, 32)
        return encoder.apply(variables, images, norm="running", capture_intermediates=True)

    _, intermediates = jax.eval_shape(run)
    maps = [x.shape[1] for x in jax.tree.leaves(intermediates) if getattr(x, "ndim", 0) == 4]
    assert min(maps) == 32 // strides and maps[0] == 32


def test_static_padding_is_tensorflows_at_the_nominal_size_and_only_there():
    static, same = build("efficientnet_b1_seed"), build("tf_efficientnet_b1")
    style = same.backbone.style
    assert style.padding == "same" and static.backbone.nominal == 240
    sides, size = [], 240
    for blocks in [[inverted.Block(3, 2, 0, 0, 0, "")], *static.backbone.blocks()]:
        for block in blocks:
            pads = inverted.static_padding(block.kernel, block.stride, size)
            sides.append((size, block.stride, pads[0]))
            size = inverted.strided_size(size, block.stride)
    # 240 -> 120 -> 60 -> 30 -> 15 -> 8; odd sizes are padded evenly, even sizes are not.
    assert [s for s in sides if s[1] == 2] == [
        (240, 2, (0, 1)),
        (120, 2, (0, 1)),
        (60, 2, (1, 2)),
        (30, 2, (0, 1)),
        (15, 2, (2, 2)),
    ]


def test_options_that_a_family_lacks_are_refused():
    with pytest.raises(UserError, match=r"student.width=32: mobilenetv2 has no such option"):
        build("mobilenetv2", width=32)
    with pytest.raises(UserError, match=r"student.stem='small': vit_tiny_p16 has no stem"):
        build("vit_tiny_p16", stem="small")
    with pytest.raises(UserError, match=r"student.zero_init_residual=True: xcit"):
        build("xcit_tiny_12_p16", zero_init_residual=True)
    with pytest.raises(UserError, match=r"student.head='dyno' is not known. Did you mean 'dino'"):
        build("resnet18", head="dyno")
    with pytest.raises(UserError, match=r"prototypes=\(0,\) has a head without any"):
        build("resnet18", head="swav", prototypes=(0,))
    assert build("vit_tiny_p16", stem="imagenet").backbone.patch == 16


@pytest.mark.parametrize("head", [*heads.VARIANTS, "regression", "none"])
def test_heads_end_where_their_papers_say(head):
    with helpers.tiny_backbone():
        encoder = build("tiny", width=6, head=head, hidden=8, dim=16, prototypes=(5, 6))
    variables = encoder.create(0, 16)
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    out, _ = jax.jit(lambda v, x: encoder.apply(v, x, norm="local", mutable=["batch_stats"]))(
        variables, images
    )
    lengths = np.linalg.norm(out.embedding, axis=-1)
    if head in ("mlp_unit", "swav", "swav_narrow", "dino", "dino_bn"):
        np.testing.assert_allclose(lengths, 1, atol=1e-5)
        assert encoder.normalised()
    else:
        assert np.abs(lengths - 1).max() > 1e-3
        assert not encoder.normalised()
    assert out.scores.shape == (4, 11)
    if head == "none":
        np.testing.assert_array_equal(out.embedding, out.features)


def test_weight_norm_makes_the_length_of_a_prototype_its_scale():
    layer = heads.Prototypes((3,), weight_norm=True)
    rows = jax.random.normal(jax.random.key(0), (2, 4))
    params = layer.init(jax.random.key(1), rows)["params"]
    stretched = {**params, "kernel0": 7 * params["kernel0"]}
    expected = jax.jit(layer.apply)({"params": params}, rows)
    np.testing.assert_allclose(layer.apply({"params": params}, rows), expected, rtol=1e-6)
    np.testing.assert_allclose(layer.apply({"params": stretched}, rows), expected, rtol=1e-5)
    doubled = {**params, "scale0": 2 * params["scale0"]}
    np.testing.assert_allclose(layer.apply({"params": doubled}, rows), 2 * expected, rtol=1e-5)


def test_adapters_have_the_options_that_the_paper_leaves_open():
    features = -jnp.ones((1, 3))
    for bias, activation in ((True, ""), (False, "relu")):
        layer = heads.Adapter(4, bias=bias, activation=activation)
        params = layer.init(jax.random.key(0), features)["params"]
        out = layer.apply({"params": params}, features)
        assert ("bias" in params["linear"]) == bias
        assert (out.min() >= 0) == (activation == "relu")


def dropped(replicas, dropout=True):
    """Returns features of 8 images, computed with dropout and stochastic depth on replicas."""
    backbone = efficientnet.EfficientNet(
        repeats=(0, 2, 0, 0, 0, 0, 0), drop_path=0.2, dropout=0.2, stem="small"
    )
    encoder = models.Encoder(backbone, heads.Identity())
    variables = encoder.create(0, 16)
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
    network = Network(encoder, "running")

    def one(rows):
        encoded, _ = encode(network, variables, {0: rows}, (0,), jax.random.key(3), dropout=dropout)
        return encoded[0].features

    split = images.reshape(replicas, 8 // replicas, 16, 16, 3)
    return jax.jit(jax.vmap(one, axis_name=AXIS))(split).reshape(8, -1)


def test_dropout_is_drawn_by_the_place_in_the_global_batch():
    alone, four, off = dropped(1), dropped(4), dropped(1, dropout=False)
    assert helpers.relative_error(four, alone) < 1e-5
    zero = np.asarray(alone) == 0
    assert 0.15 < zero.mean() < 0.25 and (np.asarray(off) != 0).all()
    assert not (zero[0] == zero[1]).all()


def test_stochastic_depth_leaves_out_whole_images():
    class Branch(helpers.nn.Module):
        @helpers.nn.compact
        def __call__(self, x):
            return drop_path(self, x, 0.25)

    def one(rows):
        return Branch().apply({}, rows, rngs={"dropout": jax.random.key(0)})

    out = np.asarray(jax.vmap(one, axis_name=AXIS)(jnp.ones((1, 400, 3, 2))))[0]
    active = out[:, 0, 0] > 0
    assert active.mean() == pytest.approx(0.75, abs=0.08)
    np.testing.assert_allclose(out[active], 1 / 0.75, rtol=1e-6)
    assert (out[~active] == 0).all()
    np.testing.assert_array_equal(Branch().apply({}, jnp.ones((2, 3))), np.ones((2, 3)))


def test_images_that_are_too_small_for_a_convnext_are_refused():
    with pytest.raises(UserError, match="16 x 16 px are too small for a ConvNeXt"):
        jax.eval_shape(lambda: models.backbone("convnext_atto").create(0, 16))
