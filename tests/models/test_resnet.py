"""ResNets and their heads: same weights, same images, same numbers as the official PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import helpers
import reference_weights
from disco_jax import convert, models
from disco_jax.convert import torch_keys

SPEC = dict(width=0, stem="", zero_init_residual=False, norm_group=0, hidden=-1, dim=128)


def build(backbone, **fields):
    return models.build_encoder(ConfigDict({**SPEC, "backbone": backbone, **fields}))


def from_fixture(name):
    """(encoder, variables, description, arrays) of a recorded network."""
    meta, ref = helpers.fixture(f"models/{name}")
    weights = meta["weights"]
    state = reference_weights.make_state_dict(
        meta["manifest"], weights["salt"], weights["conv_gain"], prefix=meta["encoder_prefix"]
    )
    encoder = build(**convert.describe(state, name)._asdict())
    like = jax.eval_shape(lambda: encoder.create(0, 32))
    return encoder, convert.from_state_dict(state, like, name), meta, ref


def images(case):
    spec = case["inputs"][0]
    made = reference_weights.make_input(spec["seed"], spec["n"], spec["height"], spec["width"])
    return jnp.asarray(made.transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
    "name", ["moco_resnet18", "moco_resnet34", "moco_resnet50", "disco_resnet18"]
)
def test_features_and_embeddings_in_eval_mode(name):
    encoder, variables, meta, ref = from_fixture(name)
    cases = [c for c in meta["cases"] if c.startswith("eval") and not c.endswith("teacher")]
    assert len(cases) >= 2
    apply = jax.jit(lambda v, x: encoder.apply(v, x, norm="running"))
    for case in cases:
        out = apply(variables, images(meta["cases"][case]))
        for output in ("features", "embedding"):
            error = helpers.relative_error(getattr(out, output), ref[f"{case}/{output}"])
            assert error < 1e-5, (case, output, error)


def test_statistics_and_gradients_in_train_mode():
    name = "moco_resnet18"
    encoder, variables, meta, ref = from_fixture(name)
    case = meta["cases"]["train_96"]

    def loss(params):
        out, new = encoder.apply(
            {**variables, "params": params}, images(case), norm="local", mutable=["batch_stats"]
        )
        return 0.5 * jnp.sum(jnp.square(out.embedding)), (out, new)

    (value, (out, new)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["params"]
    )
    assert helpers.relative_error(value, ref["train_96/loss"]) < 2e-4
    assert helpers.relative_error(out.features, ref["train_96/features"]) < 2e-4
    ours = {"params": grads, **new}
    checked = 0
    for key, expected in ref.items():
        kind, _, torch_key = key.removeprefix("train_96/").partition("/")
        if kind not in ("grad", "updated") or torch_key.endswith("num_batches_tracked"):
            continue
        path, array = torch_keys.translate(torch_key.removeprefix(meta["encoder_prefix"]), expected)
        leaf = ours
        for part in path.split("/"):
            leaf = leaf[part]
        tolerance = 2e-4
        if kind == "grad":
            tolerance = max(
                1e-4, 10 * case["float32_error"][f"grad/{torch_key}"]["max_abs_over_max"]
            )
        assert helpers.relative_error(leaf, array) < tolerance, key
        checked += 1
    assert checked >= 8


@pytest.mark.parametrize(
    "backbone, millions", [("resnet18", 10.66), ("resnet34", 20.30), ("resnet50", 22.42)]
)
def test_parameters_are_as_many_as_the_papers_count(backbone, millions):
    params = jax.eval_shape(lambda: build(backbone).create(0, 224))["params"]["backbone"]
    assert sum(x.size for x in jax.tree.leaves(params)) / 2**20 == pytest.approx(millions, abs=5e-3)


@pytest.mark.parametrize(
    "hidden, millions", [(0, 10.72), (512, 10.97), (1024, 11.28), (1280, 11.44), (2048, 11.91)]
)
def test_head_widths_give_the_parameters_of_the_width_sweep(hidden, millions):
    params = jax.eval_shape(lambda: build("resnet18", hidden=hidden).create(0, 224))["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) / 2**20 == pytest.approx(millions, abs=6e-3)


def test_small_stem_keeps_the_resolution_and_width_is_free():
    encoder = build("resnet8", width=4, hidden=32, dim=16)
    variables = encoder.create(0, 16)
    assert variables["params"]["backbone"]["conv1"]["kernel"].shape == (3, 3, 3, 4)
    out = encoder.apply(variables, jnp.ones((2, 16, 16, 3)), norm="running")
    assert out.features.shape == (2, 16) and out.embedding.shape == (2, 16)


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters():
    spec = ConfigDict({**SPEC, "backbone": "resnet8", "hidden": 32, "dim": 16})
    full = models.build_encoder(spec)
    half = models.build_encoder(spec, "bfloat16")
    variables = half.create(0, 16)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    x = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
    expected = full.apply(variables, x, norm="local", mutable=["batch_stats"])
    out = half.apply(variables, x, norm="local", mutable=["batch_stats"])
    assert out[0].embedding.dtype == jnp.float32
    assert 0 < helpers.relative_error(out[0].embedding, expected[0].embedding) < 0.05
    stats = jax.tree.leaves(out[1])
    assert {x.dtype for x in stats} == {jnp.dtype("float32")}


def test_initial_values_are_those_of_torchvision_and_follow_the_seed():
    encoder = build("resnet18", hidden=2048)
    params = encoder.create(0, 224)["params"]
    kernel = params["backbone"]["conv1"]["kernel"]
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / (49 * 64)), rel=0.02)
    for name, fan_in in (("hidden", 512), ("out", 2048)):
        for leaf in params["head"][name].values():
            assert np.max(np.abs(leaf)) <= 1 / np.sqrt(fan_in)
            assert np.std(leaf) == pytest.approx(1 / np.sqrt(3 * fan_in), rel=0.1)
    again = encoder.create(0, 224)["params"]
    other = encoder.create(1, 224)["params"]
    np.testing.assert_array_equal(again["backbone"]["conv1"]["kernel"], kernel)
    assert not np.allclose(other["backbone"]["conv1"]["kernel"], kernel)


def test_residual_branches_start_at_zero_when_asked_to():
    params = build("resnet8", zero_init_residual=True).create(0, 16)["params"]["backbone"]
    assert np.all(params["layer1_0"]["bn2"]["scale"] == 0)
    assert np.all(params["layer1_0"]["bn1"]["scale"] == 1)


def test_unknown_names_are_refused_with_the_nearest():
    from disco_jax.errors import UserError

    with pytest.raises(UserError, match=r"config\.student\.backbone.*Did you mean 'resnet50'"):
        build("resnet500")
    with pytest.raises(UserError, match=r"config\.student\.stem"):
        build("resnet18", stem="smal")
