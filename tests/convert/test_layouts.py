"""Checkpoints of other frameworks: backbone and projector form the network, other keys are unused.

Files that cannot be read are refused in one sentence that names a helpful flag, without a
traceback.
"""

import functools
import pickle
import re
import warnings

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_recognise import arrays, linear, mlp, norm

import helpers
from disco_jax import convert, models
from disco_jax.convert import save
from disco_jax.convert.backbones import resnet, vit, xcit
from disco_jax.errors import UserError

FEATURES = 16  # of the small ResNet


def small(prefix="", layout=resnet.torchvision):
    return arrays("resnet8", layout, prefix, width=4)


def still(name, width):
    """Returns a BatchNorm without scale and bias."""
    return {f"{name}.running_{leaf}": np.ones(width, np.float32) for leaf in ("mean", "var")}


def three_layers(root, bias=False, last=still):
    """Returns a projector of three layers, each followed by BatchNorm."""
    layers = {}
    for number, width, fan_in in ((0, 24, FEATURES), (3, 24, 24), (6, 32, 24)):
        layers |= linear(f"{root}{number}", width, fan_in, bias)
        layers |= (last if number == 6 else norm)(f"{root}{number + 1}", width)
    return layers


def two_layers(root, numbers=(0, 2), norms=()):
    return mlp(root, (FEATURES, 24, 32), norms, numbers)


# name -> (state dict, family, fields of the spec, prefixes of the unused keys)
LAYOUTS = {
    "simsiam": lambda: (
        small("module.encoder.")
        | three_layers("module.encoder.fc.")
        | two_layers("module.predictor.", (0, 3), (1,)),
        "simsiam",
        dict(head="mlp_bn_all", hidden=24, layers=3, dim=32),
        ("module.predictor.",),
    ),
    "moco v3": lambda: (
        small("module.base_encoder.")
        | small("module.momentum_encoder.")
        | linear("module.base_encoder.fc.0", 24, FEATURES, False)
        | norm("module.base_encoder.fc.1", 24)
        | linear("module.base_encoder.fc.3", 32, 24, False)
        | still("module.base_encoder.fc.4", 32)
        | two_layers("module.predictor.", (0, 3), (1,)),
        "moco_v3",
        dict(head="mlp_bn_all", hidden=24, layers=0, dim=32),
        ("module.predictor.", "module.momentum_encoder."),
    ),
    "vicreg": lambda: (
        small("module.backbone.")
        | three_layers("module.projector.", True, lambda *_: {})
        | {"module.projector.6.bias": np.zeros(32, np.float32)},
        "vicreg",
        dict(head="mlp_bn", hidden=24, layers=3, dim=32),
        (),
    ),
    "barlow twins": lambda: (
        small("module.backbone.")
        | three_layers("module.projector.", last=lambda *_: {})
        | still("module.bn", 32),
        "barlow_twins",
        dict(head="mlp_bn", hidden=24, layers=3, dim=32),
        ("module.bn.",),
    ),
    "lightly": lambda: (
        small("backbone.", resnet.lightly)
        | small("backbone_momentum.", resnet.lightly)
        | two_layers("projection_head.layers.")
        | two_layers("projection_head_momentum.layers.")
        | linear("online_classifier.linear", 10, FEATURES),
        "lightly",
        dict(head="mlp", hidden=24, dim=32, stem=""),
        ("backbone_momentum.", "projection_head_momentum.", "online_classifier."),
    ),
    "solo-learn": lambda: (
        small("backbone.")
        | small("momentum_backbone.")
        | two_layers("projector.")
        | two_layers("momentum_projector.")
        | two_layers("predictor.")
        | linear("classifier", 10, FEATURES),
        "solo_learn",
        dict(head="mlp", hidden=24, dim=32),
        ("momentum_backbone.", "momentum_projector.", "predictor.", "classifier."),
    ),
    "a classifier beside the backbone alone": lambda: (
        small("backbone.") | linear("classifier", 64, FEATURES),
        "torchvision",
        dict(head="none", dim=FEATURES),
        ("classifier.",),
    ),
    "a classifier in the backbone": lambda: (
        small("backbone.") | linear("backbone.fc", 10, FEATURES) | two_layers("projector."),
        "solo_learn",
        dict(head="mlp", dim=32),
        ("backbone.fc.",),
    ),
    "openmmlab, moco": lambda: (
        small("backbone.")
        | two_layers("neck.mlp.")
        | small("encoder_q.0.")
        | small("encoder_k.0.")
        | {"data_preprocessor.mean": np.zeros((3, 1, 1), np.float32)},
        "openmmlab",
        dict(head="mlp", hidden=24, dim=32),
        ("encoder_q.", "encoder_k.", "data_preprocessor."),
    ),
    "openmmlab": lambda: (
        small("backbone.")
        | linear("neck.fc0", 24, FEATURES, False)
        | norm("neck.bn0", 24)
        | linear("neck.fc1", 24, 24, False)
        | norm("neck.bn1", 24)
        | linear("neck.fc2", 32, 24, False)
        | still("neck.bn2", 32)
        | two_layers("head.predictor.")
        | small("target_net.module.0."),
        "openmmlab",
        dict(head="mlp_bn_all", hidden=24, layers=3, dim=32),
        ("target_net.",),
    ),
    "deeper in a program": lambda: (
        small("model.backbone.") | small("model.ema_backbone.") | two_layers("model.projector."),
        "torchvision",
        dict(head="mlp", dim=32),
        ("model.ema_backbone.",),
    ),
    "five layers": lambda: (
        small() | mlp("fc.", (FEATURES, 24, 24, 24, 24, 32), numbers=(0, 2, 4, 6, 8)),
        "torchvision",
        dict(head="mlp", hidden=24, layers=5, dim=32),
        (),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_backbone_and_projector_are_read_and_nothing_else(name):
    state, family, fields, unused = LAYOUTS[name]()
    allow = ("head.*",) if name == "openmmlab" else ()
    imported = convert.from_mapping(state, allow=allow)
    assert imported.family == family
    assert {key: imported.spec[key] for key in fields} == fields
    assert {key for key in state if key.startswith(unused)} >= set(imported.unused_keys) - {
        key for key in state if key.startswith("head.")
    }
    assert len(imported.keys) + len(imported.unused_keys) == sum(
        "num_batches" not in key for key in state
    )


def test_arrays_beside_the_weights_may_have_any_name(tmp_path):
    """Ignores entries that are not state dicts: a best score may be called model."""
    path = written(tmp_path, {"model": np.ones(3), "teacher": 0.5, "state_dict": small()})
    assert convert.read(path)[1] == "state_dict"


@pytest.mark.parametrize("name", ["simsiam", "barlow twins", "five layers"])
def test_a_head_of_any_depth_computes_what_it_says(name):
    """Compares with NumPy: linear layers, BatchNorm on stored statistics if there is one, ReLU."""
    state, *_ = LAYOUTS[name]()
    rng = np.random.default_rng(0)
    state = {
        key: rng.uniform(0.5, 1.5, value.shape).astype(np.float32)
        if key.endswith(("var", "mean")) or value.ndim == 1
        else rng.normal(0, 0.2, value.shape).astype(np.float32)
        for key, value in state.items()
    }
    root = {"simsiam": "module.encoder.fc.", "barlow twins": "module.projector."}.get(name, "fc.")
    encoder, variables = convert.from_state_dict(state)
    features = rng.normal(size=(3, FEATURES)).astype(np.float32)
    expected, numbers = features, (0, 3, 6) if name != "five layers" else (0, 2, 4, 6, 8)
    for number in numbers:
        layer = f"{root}{number}"
        bias = state.get(f"{layer}.bias", 0.0)
        expected = expected @ state[f"{layer}.weight"].T + bias
        after = f"{root}{number + 1}"
        if f"{after}.running_var" in state:
            expected = expected - state[f"{after}.running_mean"]
            expected = expected / np.sqrt(state[f"{after}.running_var"] + 1e-5)
            expected = expected * state.get(f"{after}.weight", 1.0) + state.get(f"{after}.bias", 0)
        if number != numbers[-1]:
            expected = np.maximum(expected, 0)
    head = {part: tree["head"] for part, tree in variables.items() if "head" in tree}
    actual = jax.jit(lambda v, x: encoder.head.apply(v, x, norm="running"))(head, features)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "head, layers", [("mlp", 3), ("mlp_bn", 4), ("mlp_bn_all", 3), ("dino", 4)]
)
def test_a_deep_head_goes_out_and_comes_back(head, layers):
    fields = dict(backbone="resnet8", width=4, head=head, hidden=24, layers=layers, dim=32)
    encoder = models.build_encoder(helpers.encoder_spec(**fields))
    variables = jax.tree.map(
        lambda x: np.random.default_rng(x.size).random(x.shape, np.float32) + 0.5,
        jax.eval_shape(lambda: encoder.create(0, 32)),
    )
    saved = save.state_dict("resnet8", encoder, variables, "moco", with_head=True)
    imported = convert.from_mapping(saved.arrays)
    assert (imported.spec["head"], imported.spec["layers"]) == (head, layers)
    jax.tree.map(np.testing.assert_array_equal, dict(imported.variables), dict(variables))


# name -> (state dict, pattern of the error message)
REFUSED = {
    "widths": lambda: (
        small("backbone.") | mlp("projector.", (FEATURES, 24, 40, 32), numbers=(0, 2, 4)),
        r"has hidden layers of several widths: 24, 40: leave it out with --allow 'projector\.\*'",
    ),
    "layer norm": lambda: (
        small("backbone.")
        | two_layers("projector.", (0, 3))
        | {f"projector.1.{leaf}": np.ones(24, np.float32) for leaf in ("weight", "bias")},
        r"a layer that is neither linear nor BatchNorm: leave it out with --allow 'projector",
    ),
    "order": lambda: (
        small("backbone.") | two_layers("projector.", (0, 2)) | norm("projector.3", 32),
        r"a sequence of layers that no head here has: linear, linear, BatchNorm: leave it out",
    ),
    "another name": lambda: (
        small("backbone.") | two_layers("embedder."),
        r"has embedder beside the backbone, .* add --allow 'embedder\.\*'",
    ),
    "two students": lambda: (
        small("left.") | small("right."),
        r"holds networks under 'left\.', 'right\.'; choose one with --prefix",
    ),
    "moco v3, vit": lambda: (
        arrays("vit_small_p16", vit.dino, "module.base_encoder."),
        r"ViT-S, which has 12 attention heads, and vit_small_p16 has 6",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_sentence(name):
    state, message = REFUSED[name]()
    with pytest.raises(UserError, match=message) as error:
        convert.from_mapping(state)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["widths", "layer norm", "order", "another name"])
def test_the_flag_that_a_refusal_names_helps(name):
    state, _ = REFUSED[name]()
    with pytest.raises(UserError) as error:
        convert.from_mapping(state)
    patterns = re.findall(r"--allow '(.+?)'", str(error.value))
    imported = convert.from_mapping(state, allow=patterns)
    assert patterns and imported.spec["head"] == "none" and imported.unused_keys


def test_a_classifier_is_no_projection_head_whatever_its_classes():
    for classes in (2, 10, 37, 100, 365, 1000, 21_841):
        imported = convert.from_mapping(small() | linear("fc", classes, FEATURES))
        assert (imported.spec["head"], imported.spec["dim"]) == ("none", FEATURES)
        assert imported.classifiers == ("fc",) and set(imported.unused_keys) == {
            "fc.weight",
            "fc.bias",
        }
    for width in (32, 128, 2048):  # MoCo v1's, CompRess's
        assert convert.from_mapping(small() | linear("fc", width, FEATURES)).spec["dim"] == width


def test_biases_and_scales_are_taken_for_granted_only_where_a_layer_can_be_without():
    state, *_ = LAYOUTS["simsiam"]()
    for key in ("module.encoder.fc.1.weight", "module.encoder.fc.7.running_var"):
        with pytest.raises(UserError, match="missing"):
            convert.from_mapping({k: v for k, v in state.items() if k != key})
    plain = small() | two_layers("fc.")
    del plain["fc.0.bias"]
    with pytest.raises(UserError, match="missing: params/head/hidden/bias"):
        convert.from_mapping(plain)


# name -> (function from the state dict to the file's content, expected entry)
CONTAINERS = {
    "model_state_dict": (lambda s: {"epoch": 3, "model_state_dict": s}, "model_state_dict"),
    "weights": (lambda s: {"weights": s, "best": np.ones(2)}, "weights"),
    "network": (
        lambda s: {"trainer": {"network": s}, "optimizer": {"state": {}}},
        "trainer.network",
    ),
    "with an optimizer": (
        lambda s: {
            "net_weights": s,
            "optim": {"state": {0: {"exp_avg": np.ones((2, 2))}}},
            "scaler": {"scale": np.ones((1, 1))},
        },
        "net_weights",
    ),
}


def written(folder, content):
    path = folder / "file.pkl"
    path.write_bytes(pickle.dumps(content))
    return path


@pytest.mark.parametrize("name", CONTAINERS)
def test_weights_are_found_under_the_names_that_people_give_them(name, tmp_path):
    wrap, entry = CONTAINERS[name]
    arrays_, container = convert.read(written(tmp_path, wrap(small())))
    assert container == entry and arrays_.keys() == small().keys()


def test_of_several_networks_the_entry_is_asked_for(tmp_path):
    path = written(tmp_path, {"nets": {"left": small(), "right": small()}, "epoch": 1})
    with pytest.raises(UserError, match=r"nets\.left, nets\.right: choose one with --entry"):
        convert.load(path)
    assert convert.read(path, "nets.right")[1] == "nets.right"


def damaged(state, data):
    """Returns the state dict with 1 to 3 arrays dropped, renamed or of another shape or type."""
    state = dict(state)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(state)))
        value = state.pop(key)
        kind = data.draw(st.integers(0, 5))
        if kind == 1:
            state[key + data.draw(st.sampled_from(["x", ".0", ".weight"]))] = value
        elif kind == 2:
            shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=5)))
            state[key] = np.zeros(shape, np.float32)
        elif kind == 3 and value.dtype.kind != "U":  # strings such as "0.0" are no integers
            dtype = data.draw(st.sampled_from(["i8", "c8", "U3", "?", "f2"]))
            with warnings.catch_warnings(action="ignore"):  # lossy casts
                state[key] = value.astype(dtype)
        elif kind == 4:
            state[key] = np.full(value.shape, np.nan, np.float32)
    return state


DAMAGED = LAYOUTS | {
    "vit": lambda: (arrays("vit_tiny_p16", vit.dino),),
    "queue": lambda: (
        small("module.encoder_q.")
        | two_layers("module.encoder_q.fc.")
        | {"module.queue": np.ones((32, 8), np.float32), "module.queue_ptr": np.zeros(1, int)},
    ),
    "xcit": lambda: (xcit.to_timm(arrays("xcit_tiny_12_p16", xcit.original)),),
    "prototypes": lambda: (
        small("module.")
        | two_layers("module.projection_head.", (0, 3), (1,))
        | linear("module.prototypes", 30, 32, bias=False),
    ),
}


@functools.cache
def whole(name):
    """Returns the state dict of a layout, which all examples share."""
    return DAMAGED[name]()[0]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_damaged_state_dict_gives_a_network_or_a_clear_error(data):
    state = damaged(whole(data.draw(st.sampled_from(sorted(DAMAGED)))), data)
    try:
        imported = convert.from_mapping(state)
    except UserError:
        return
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(imported.variables))
