"""Same weights, same images, same numbers as the official PyTorch code, for every layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
import reference_weights
from disco_jax import convert

# {recorded network: eval cases}, each a program to compile. Tests in train mode cover 96 px; the
# test of class tokens covers the ViT at 192 px. Every padding is tested at 224 px and a smaller
# size: symmetric (down to maps of one pixel at 32 px), fixed for 224 px, patches.
EVAL = {
    "moco_resnet18": ("eval_224", "eval_32"),
    "moco_resnet34": ("eval_96",),
    "moco_resnet50": ("eval_96",),
    "disco_resnet18": ("eval_96",),
    "disco_efficientnet_b0": ("eval_224",),
    "disco_mobilenetv3_large": ("eval_32",),
    "swav_resnet50": ("eval_96",),
    "sslight_dino_mobilenetv2": ("eval_224",),
    "sslight_swav_mobilenetv2": ("eval_96",),
    "seed_efficientnet_b0": ("eval_224", "eval_96"),
    "dino_vit_tiny_p16": ("eval_224",),
    "xcit_tiny_12_p16": ("eval_32",),
    "timm_convnext_atto": ("eval_224", "eval_96x128"),
}
CASES = [(name, case) for name, cases in EVAL.items() for case in cases]
RENAMED = {"logits": "scores"}  # recorded outputs by another name here
KNOWN = ("features", "embedding", "scores", "logits")


def imported(name, **options):
    _, _, state = helpers.recorded_state(name)
    return convert.from_mapping(state, **options)


@functools.partial(jax.jit, static_argnums=0)
def forward(encoder, variables, images):
    """Encodes images as evaluations do; one program for all checkpoints of an encoder."""
    return encoder.apply(variables, images, norm="running")


@pytest.mark.parametrize("name, case", CASES)
def test_features_embeddings_and_scores_in_eval_mode(name, case):
    meta, arrays, _ = helpers.recorded_state(name)
    checkpoint = imported(name)
    images = helpers.recorded_images(meta["cases"][case])
    out = forward(checkpoint.encoder, checkpoint.variables, images)
    assert_recorded(meta, arrays, case, out)


def assert_recorded(meta, arrays, case, out):
    outputs = [o for o in meta["cases"][case]["outputs"] if o in KNOWN]
    assert outputs
    for output in outputs:
        expected = arrays[f"{case}/{output}_f64"]
        error = helpers.relative_error(getattr(out, RENAMED.get(output, output)), expected)
        assert error < 1e-5, (output, error)


@pytest.mark.parametrize("name", ["disco_resnet18", "disco_efficientnet_b0"])
def test_the_teacher_beside_a_student_is_read_by_its_prefix(name):
    meta, arrays, _ = helpers.recorded_state(name)
    checkpoint = imported(name, prefix="module.teacher_encoder_q.")
    assert checkpoint.spec["backbone"] == "resnet50"
    images = helpers.recorded_images(meta["cases"]["eval_96_teacher"])
    out = forward(checkpoint.encoder, checkpoint.variables, images)
    for output in ("features", "embedding"):
        expected = arrays[f"eval_96_teacher/{output}_f64"]
        assert helpers.relative_error(getattr(out, output), expected) < 1e-5


def test_class_tokens_of_the_last_blocks_and_a_position_embedding_of_another_size():
    meta, arrays, _ = helpers.recorded_state("dino_vit_tiny_p16")
    checkpoint = imported("dino_vit_tiny_p16")
    encoder = checkpoint.encoder
    images = helpers.recorded_images(meta["cases"]["eval_192"])

    @jax.jit
    def run(variables, images):
        backbone = {"params": variables["params"]["backbone"]}
        tokens = encoder.backbone.apply(backbone, images, norm="running", blocks=4)
        return tokens, encoder.apply(variables, images, norm="running")

    tokens, out = run(checkpoint.variables, images)
    assert helpers.relative_error(tokens, arrays["eval_192/linear_features_f64"]) < 1e-5
    assert_recorded(meta, arrays, "eval_192", out)


# {recorded network: (output in the loss, tolerance of outputs and statistics)}.
TRAIN = {
    "moco_resnet18": ("embedding", 2e-4),
    "disco_efficientnet_b0": ("embedding", 2e-4),
    "disco_mobilenetv3_large": ("embedding", 2e-4),
    "sslight_dino_mobilenetv2": ("scores", 2e-4),
    "xcit_tiny_12_p16": ("features", 2e-4),
}


@pytest.mark.parametrize("name", TRAIN)
def test_outputs_statistics_and_gradients_in_train_mode(name):
    """XCiT takes over a minute: its gradient is compiled whole, as in training."""
    output, tolerance = TRAIN[name]
    meta, arrays, _ = helpers.recorded_state(name)
    checkpoint = imported(name)
    encoder, variables = checkpoint.encoder, checkpoint.variables
    case = meta["cases"]["train_96"]
    images = helpers.recorded_images(case)

    def loss(params):
        out, new = encoder.apply(
            {**variables, "params": params}, images, norm="local", mutable=["batch_stats"]
        )
        return 0.5 * jnp.sum(jnp.square(getattr(out, output))), (out, new)

    (value, (out, new)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["params"]
    )
    assert helpers.relative_error(value, arrays["train_96/loss"]) < tolerance
    assert helpers.relative_error(out.features, arrays["train_96/features"]) < tolerance
    paths = {key: path.split("/") for key, path in checkpoint.keys.items()}
    checked = 0
    for key in arrays:
        kind, _, name = key.removeprefix("train_96/").partition("/")
        if kind not in ("grad", "updated") or name.endswith("num_batches_tracked"):
            continue
        leaf = {"params": grads, **new}
        for part in paths[name]:
            leaf = leaf[part]
        limit = tolerance
        if kind == "grad":
            error = case["float32_error"][f"grad/{name}"]["max_abs_over_max"]
            limit = max(1e-4, 10 * error)
        expected = in_flax_layout(arrays[key], leaf.ndim)
        assert helpers.relative_error(leaf, expected) < limit, key
        checked += 1
    assert checked >= 8


def in_flax_layout(array, ndim):
    """Transposes PyTorch's gradient of a convolution, a linear layer or a vector."""
    if array.ndim == 4 and ndim == 2:
        array = array.reshape(array.shape[:2])
    if array.ndim in (2, 4) and array.ndim == ndim:
        return array.transpose((2, 3, 1, 0) if ndim == 4 else (1, 0))
    return array


def test_gradients_of_a_vit():
    """DINO's ViT has no recorded train case; these gradients were recorded from timm's."""
    meta, _, _ = helpers.recorded_state("dino_vit_tiny_p16")
    _, expected = helpers.fixture("models/vit_tiny_p16_gradients")
    checkpoint = imported("dino_vit_tiny_p16")
    images = helpers.recorded_images(meta["cases"]["eval_224"])

    def loss(params):
        out = checkpoint.encoder.apply({"params": params}, images, norm="running")
        return 0.5 * jnp.sum(jnp.square(out.features))

    grads = jax.jit(jax.grad(loss))(checkpoint.variables["params"])
    row = expected.pop("pos_embed_row")
    assert helpers.relative_error(grads["backbone"]["pos_embed"][0, 57], row) < 1e-4
    for key, array in expected.items():
        leaf = grads
        for part in checkpoint.keys[f"backbone.{key}"].split("/")[1:]:
            leaf = leaf[part]
        assert helpers.relative_error(leaf, array) < 1e-4, key


def test_the_reference_generator_is_what_the_fixtures_were_made_with():
    reference_weights.self_check()
    assert np.isfinite(helpers.recorded_state("moco_resnet18")[2]["module.queue"]).all()
