"""Families of checkpoints, each recognised by its keys under its own prefixes and heads."""

import functools

import jax
import numpy as np
import pytest

import helpers
from disco_jax import convert, models
from disco_jax.convert import recognise, save
from disco_jax.convert.backbones import FAMILIES as BACKBONE_FAMILIES
from disco_jax.convert.backbones import efficientnet, mobilenet, resnet, vit, xcit
from disco_jax.convert.family import Export
from disco_jax.errors import UserError


def arrays(backbone, layout, prefix="", **fields):
    """Returns a state dict of zeros for a network in a layout, without a head."""
    zeros = _zeros(backbone, layout, tuple(fields.items()))
    return {prefix + key: value for key, value in zeros.items()}


@functools.cache
def _zeros(backbone, layout, fields):
    encoder = models.build_encoder(helpers.encoder_spec(backbone, head="none", **dict(fields)))
    like = jax.eval_shape(lambda: encoder.create(0, 224))
    variables = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), like)
    arrays, _ = save._arrays(
        encoder, variables, Export(layout), recognise.Prefix(""), recognise.Head()
    )
    return arrays


def linear(name, width, fan_in, bias=True):
    layer = {f"{name}.weight": np.zeros((width, fan_in), np.float32)}
    return {**layer, f"{name}.bias": np.zeros(width, np.float32)} if bias else layer


def norm(name, width):
    leaves = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{leaf}": np.ones(width, np.float32) for leaf in leaves}


def mlp(root, sizes, norms=(), numbers=None):
    """Returns linear layers of the widths `sizes` under `root`, and BatchNorms numbered `norms`."""
    numbers = numbers or (0, 2) if len(sizes) == 3 else numbers
    layers = {}
    for number, fan_in, width in zip(numbers, sizes[:-1], sizes[1:], strict=True):
        layers |= linear(f"{root}{number}", width, fan_in)
    for number in norms:
        before = max(n for n in numbers if n < number)
        layers |= norm(f"{root}{number}", sizes[numbers.index(before) + 1])
    return layers


def r18(prefix="", layout=resnet.torchvision):
    return arrays("resnet18", layout, prefix)


# name -> (state dict, family, fields of the spec)
FAMILIES = {
    "moco v1": lambda: (
        r18("module.encoder_q.") | linear("module.encoder_q.fc", 128, 512),
        "moco_v1",
        dict(head="mlp", hidden=0, dim=128),
    ),
    "moco v2": lambda: (
        r18("module.encoder_q.")
        | r18("module.encoder_k.")
        | mlp("module.encoder_q.fc.", (512, 512, 128)),
        "moco_v2",
        dict(head="mlp", hidden=512, dim=128),
    ),
    "disco": lambda: (
        r18("module.encoder_q.")
        | mlp("module.encoder_q.fc.", (512, 2048, 128))
        | r18("module.teacher_encoder_q."),
        "disco",
        dict(backbone="resnet18", hidden=2048),
    ),
    "disco swav": lambda: (
        r18("module.")
        | mlp("module.projection_head.", (512, 2048, 128), (1,), (0, 3))
        | linear("module.prototypes", 30, 128, bias=False),
        "swav",
        dict(head="swav", hidden=2048, dim=128, prototypes=(30,)),
    ),
    "seed teacher, simclr": lambda: (
        r18("module.module.module.")
        | mlp("module.module.module.fc.", (512, 512, 128), (1,), (0, 3)),
        "simclr",
        dict(head="swav", hidden=512),
    ),
    "seed student": lambda: (
        arrays("mobilenetv3_large_seed", mobilenet.seed_v3, "module.student.")
        | mlp("module.student.fc.", (1280, 1280, 128)),
        "seed",
        dict(backbone="mobilenetv3_large_seed", hidden=1280),
    ),
    "bingo": lambda: (
        arrays("efficientnet_b0_seed", efficientnet.lukemelas, "module.encoder_q.")
        | mlp("module.encoder_q.fc.", (1280, 2048, 128))
        | r18("module.encoder_k."),
        "bingo",
        dict(backbone="efficientnet_b0_seed", hidden=2048),
    ),
    "seed, published": lambda: (
        arrays("efficientnet_b1_seed", efficientnet.lukemelas, "module.encoder_q.")
        | mlp("module.encoder_q.fc.", (1280, 1280, 128)),
        "seed",
        dict(backbone="efficientnet_b1_seed", hidden=1280),
    ),
    "swav without batch norm": lambda: (
        r18("module.") | mlp("module.projection_head.", (512, 64, 32)),
        "swav",
        dict(head="mlp_unit", hidden=64, dim=32),
    ),
    "deepcluster v2": lambda: (
        r18("module.")
        | mlp("module.projection_head.", (512, 64, 32), (1,), (0, 3))
        | linear("module.prototypes.prototypes0", 30, 32, bias=False)
        | linear("module.prototypes.prototypes1", 40, 32, bias=False),
        "deepcluster_v2",
        dict(head="swav", prototypes=(30, 40)),
    ),
    "dino, resnet": lambda: (
        r18("module.backbone.")
        | mlp("module.head.mlp.", (512, 64, 64, 16), (1, 4), (0, 3, 6))
        | {
            "module.head.last_layer.weight_g": np.ones((50, 1), np.float32),
            "module.head.last_layer.weight_v": np.ones((50, 16), np.float32),
        },
        "dino",
        dict(head="dino_bn", hidden=64, dim=16, prototypes=(50,)),
    ),
    "dino, backbone": lambda: (
        arrays("vit_small_p16", vit.dino),
        "dino",
        dict(backbone="vit_small_p16", head="none", dim=384),
    ),
    "ressl": lambda: (
        r18("module.encoder_q.net.")
        | linear("module.encoder_q.head.linear1", 4096, 512)
        | linear("module.encoder_q.head.linear2", 512, 4096),
        "ressl",
        dict(head="mlp", hidden=4096, dim=512),
    ),
    "compress": lambda: (r18("module."), "compress", dict(head="none", dim=512)),
    "compress, one queue": lambda: (
        r18("module.") | linear("module.fc", 2048, 512),
        "compress",
        dict(head="mlp", hidden=0, dim=2048),
    ),
    "simreg": lambda: (
        arrays("mobilenetv2", mobilenet.torchvision_v2, "encoder_q.module.")
        | r18("encoder_t.module.")
        | mlp("predict_q.module.", (1280, 2560, 1280, 2560, 2048), (1, 5), (0, 3, 4, 7)),
        "simreg",
        dict(backbone="mobilenetv2", head="regression", dim=2048),
    ),
    "sslight, moco": lambda: (
        arrays("mobilenetv2", mobilenet.sslight_v2, "module.encoder_q.backbone.")
        | mlp("module.encoder_q.head.mlp.", (1280, 2048, 128)),
        "sslight",
        dict(head="mlp", hidden=2048, dim=128),
    ),
    "sslight, resnet": lambda: (
        r18("module.student.backbone.", resnet.sslight)
        | {"module.classifier.weight": np.zeros((1000, 512), np.float32)},
        "sslight",
        dict(backbone="resnet18", head="none"),
    ),
    "torchvision": lambda: (
        arrays("mobilenetv3_large_tv", mobilenet.torchvision_v3)
        | linear("classifier.3", 1000, 1280),
        "torchvision",
        dict(backbone="mobilenetv3_large_tv", head="none", dim=1280),
    ),
    "timm": lambda: (
        arrays("efficientnet_b1", efficientnet.timm) | linear("classifier", 1000, 1280),
        "timm",
        dict(backbone="efficientnet_b1", head="none", dim=1280),
    ),
    "timm, xcit": lambda: (
        xcit.to_timm(arrays("xcit_tiny_12_p16", xcit.original)),
        "dino",
        dict(backbone="xcit_tiny_12_p16", head="none"),
    ),
    "small images": lambda: (
        arrays("resnet18", resnet.torchvision, stem="small"),
        "torchvision",
        dict(backbone="resnet18", stem="small"),
    ),
    "wide": lambda: (
        arrays("resnet50", resnet.torchvision, "module.", width=24),
        "compress",
        dict(backbone="resnet50", width=24),
    ),
    "vit for large images": lambda: (
        arrays("vit_tiny_p16", vit.dino, grid=24),
        "dino",
        dict(backbone="vit_tiny_p16", grid=24),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_known_by_its_keys(name):
    state, family, fields = FAMILIES[name]()
    imported = convert.from_mapping(state)
    assert imported.family == family
    assert {key: imported.spec[key] for key in fields} == fields


def test_the_recorded_checkpoints_are_known():
    expected = {
        "moco_resnet50": ("moco_v2", "resnet50", "mlp"),
        "disco_efficientnet_b0": ("disco", "efficientnet_b0", "mlp"),
        "disco_mobilenetv3_large": ("disco", "mobilenetv3_large", "mlp"),
        "swav_resnet50": ("swav", "resnet50", "swav"),
        "sslight_dino_mobilenetv2": ("sslight", "mobilenetv2", "dino_bn"),
        "sslight_swav_mobilenetv2": ("sslight", "mobilenetv2", "swav"),
        "seed_efficientnet_b0": ("seed", "efficientnet_b0_seed", "mlp"),
        "dino_vit_tiny_p16": ("dino", "vit_tiny_p16", "dino"),
        "xcit_tiny_12_p16": ("dino", "xcit_tiny_12_p16", "none"),
    }
    for name, (family, backbone, head) in expected.items():
        state = helpers.recorded_state(name)[2]
        recognised = recognise.recognise(state, name)
        assert (recognised.family, recognised.spec["backbone"], recognised.spec["head"]) == (
            family,
            backbone,
            head,
        )


def test_simclrs_flat_names_put_the_shortcut_first():
    """Checks that the first convolution of a stage widens the shortcut: 64 -> 256 channels."""
    state = arrays("resnet50", resnet.tensorflow, width=8)
    shapes = {n: state[f"conv2d_{n}.weight"].shape for n in (1, 2, 3, 4, 5, 11, 13, 24, 43, 52)}
    assert shapes == {
        1: (32, 8, 1, 1),
        2: (8, 8, 1, 1),
        3: (8, 8, 3, 3),
        4: (32, 8, 1, 1),
        5: (8, 32, 1, 1),
        11: (64, 32, 1, 1),
        13: (16, 16, 3, 3),
        24: (128, 64, 1, 1),
        43: (256, 128, 1, 1),
        52: (256, 64, 1, 1),
    }
    imported = convert.from_mapping(state | linear("fc", 1000, 256))
    assert imported.family == "simclr" and imported.spec["width"] == 8
    assert imported.normalisation == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_byol_cannot_be_told_from_its_keys_and_pads_as_tensorflow_does():
    state = arrays("resnet50", resnet.torchvision)
    assert recognise.recognise(state, "it").spec["backbone"] == "resnet50"
    imported = convert.from_mapping(state, family="byol")
    assert imported.spec["backbone"] == "resnet50_same"
    assert imported.encoder.backbone.padding == "same"


def test_swavs_own_normalisation_is_kept():
    state = helpers.recorded_state("swav_resnet50")[2]
    assert convert.from_mapping(state).normalisation[1] == (0.228, 0.224, 0.225)
    assert recognise.recognise(helpers.recorded_state("moco_resnet18")[2], "it").normalisation[
        1
    ] == (0.229, 0.224, 0.225)


def test_an_architecture_that_is_not_ours_is_refused():
    state = r18()
    state = {k.replace("layer4.1", "layer4.2"): v for k, v in state.items()} | state
    with pytest.raises(UserError, match=r"torchvision_resnet that is none of .*resnet18"):
        convert.from_mapping(state)


def test_usual_names_of_architectures_are_understood():
    state = arrays("mobilenetv2", mobilenet.torchvision_v2)
    for arch in ("mobilenet_v2", "MobileNetV2_100", "mobilenetv2"):
        assert recognise.recognise(state, "it", arch=arch).spec["backbone"] == "mobilenetv2"
    state = arrays("efficientnet_b0", efficientnet.timm)
    for arch in ("tf_efficientnet_b0", "efficientnet_b0"):
        assert recognise.recognise(state, "it", arch=arch).spec["backbone"] == arch
    imported = convert.from_mapping(state, arch="tf_efficientnet_b0")
    assert imported.encoder.backbone == models.backbone("tf_efficientnet_b0").backbone


def test_usual_names_of_families_are_understood():
    state = r18("module.")
    for family, expected in (("MoCo", "moco_v2"), ("SeLa-v2", "deepcluster_v2"), ("byol", "byol")):
        assert recognise.recognise(state, "it", family=family).family == expected


def test_aliases_lead_to_names_that_exist():
    assert set(recognise._ALIASES.values()) <= models.BACKBONES.keys()
    assert set(recognise._FAMILY_ALIASES.values()) <= set(recognise.FAMILIES)


def test_every_backbone_belongs_to_one_family_that_writes_it():
    written = [name for family in BACKBONE_FAMILIES for name in family.exports["moco"]]
    assert sorted(written) == sorted(models.BACKBONES)
    for family in BACKBONE_FAMILIES:
        names = set(family.exports["moco"])
        named = {*family.aliases.values(), *family.variant_of, *family.variant_of.values()}
        named |= {*family.by_code_base.values(), *(name for _, name in family.refused)}
        for exports in family.exports.values():
            named |= {*exports, *(export.read_as for export in exports.values())} - {""}
        assert named <= names
