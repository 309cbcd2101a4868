"""Networks in other runtimes: equal features for any batch, and complete files or none."""

import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax import errors, files, models
from disco_jax.convert import onnx, stablehlo, tflite
from disco_jax.models import heads
from disco_jax.models.encoder import Encoder

SPEC = dict(head="none", hidden=-1, dim=16, prototypes=(), adapter=0, norm_group=0)
# Fields that only some families have.
SPEC |= dict(width=4, stem="", zero_init_residual=False, grid=0)
RUNTIMES = {"onnx": onnx, "tflite": tflite, "stablehlo": stablehlo}
NEEDS = {"onnx": ("jax2onnx", "onnxruntime"), "tflite": ("tensorflow",), "stablehlo": ()}


def runtime(name):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    return RUNTIMES[name]


def network(encoder, size):
    """Returns images -> embedding for a network with random weights and statistics."""
    rng = np.random.default_rng(0)

    def disturbed(path, x):
        x = np.asarray(x)
        if path[-1].key == "var":
            return rng.uniform(0.5, 2, x.shape).astype(np.float32)
        factor, shift = rng.uniform(0.7, 1.3, x.shape), rng.normal(0, 0.1, x.shape)
        return (x * factor + shift * (x.ndim < 2)).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(disturbed, dict(encoder.create(0, size)))
    return lambda images: encoder.apply(variables, images, norm="running").embedding


def resnet(**fields):
    """Returns a narrow ResNet for images of 16 px."""
    spec = models.NetworkSpec(**{**SPEC, "backbone": "resnet8", **fields})
    return network(models.build_encoder(spec), 16)


# Stages that together contain every kind of layer of the family.
STAGES = {"mobilenetv2": (0, 1, 2), "mobilenetv3_large": (0, 2, 3)}


@functools.cache
def shallow(backbone):
    """Returns a network for 64 px with few of the backbone's blocks, images and its output."""
    cls, fields = models.BACKBONES[backbone]
    fields = dict(fields)
    if "stages" in fields:
        fields["stages"] = tuple(fields["stages"][stage][:1] for stage in STAGES[backbone])
    elif "repeats" in fields:  # 3x3, and with a stride 3x3 and 5x5
        fields["repeats"] = (1, 1, 1, 0, 0, 0, 0)
    else:
        fields["depth"] = 1
    function = network(Encoder(cls(**fields), heads.Identity()), 64)
    x = images(3, 64)
    return function, x, jax.jit(function)(x)


@functools.cache
def swav():
    """Returns a compiled narrow ResNet with the ImageNet stem and SwAV's head."""
    return jax.jit(resnet(stem="imagenet", head="swav"))


def images(count, size):
    return np.random.default_rng(1).normal(size=(count, size, size, 3)).astype(np.float32)


def write(deploy, function, size, path):
    """Writes a network; checks the error message and skips where the converter is behind jax."""
    try:
        deploy.write(function, size, path)
    except errors.UserError as error:
        if jax.version.__version_info__ < (0, 11):
            raise
        assert f"jax {jax.__version__}" in str(error) and not path.exists()
        pytest.skip(str(error))


def assert_same(actual, expected, tolerance=1e-4):
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    assert helpers.relative_error(actual, expected) < tolerance


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_file_computes_the_same_for_one_image_and_for_three(name, tmp_path):
    deploy = runtime(name)
    function, path = swav(), tmp_path / "network"
    write(deploy, function, 16, path)
    assert [file.name for file in tmp_path.iterdir()] == ["network"]
    one, three = images(1, 16), images(3, 16)
    assert_same(deploy.run(path, one), function(one))
    assert_same(deploy.run(str(path), three.astype(np.float64)), function(three))


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize(
    "backbone",
    [
        "mobilenetv2",
        "mobilenetv3_large",
        "efficientnet_b0_seed",
        "vit_tiny_p16",
        "xcit_tiny_12_p16",
    ],
)
def test_every_family_computes_the_same(name, backbone, tmp_path):
    deploy = runtime(name)
    function, x, expected = shallow(backbone)
    write(deploy, function, 64, tmp_path / "network")
    assert_same(deploy.run(tmp_path / "network", x), expected)


def test_stablehlo_runs_on_three_platforms_at_the_precision_of_the_function(tmp_path):
    with jax.default_matmul_precision("highest"):
        stablehlo.write(resnet(), 16, tmp_path / "network")
    exported = jax.export.deserialize(bytearray((tmp_path / "network").read_bytes()))
    assert exported.platforms == stablehlo.PLATFORMS == ("cpu", "cuda", "tpu")
    convolutions = [line for line in exported.mlir_module().splitlines() if "convolution(" in line]
    assert convolutions and all("HIGHEST" in line for line in convolutions)


def test_onnx_takes_channels_first_and_any_batch(tmp_path):
    runtime("onnx")
    from onnx import checker, load

    onnx.write(resnet(), 16, tmp_path / "network.onnx")
    checker.check_model(load(tmp_path / "network.onnx"), full_check=True)
    from onnxruntime import InferenceSession

    session = InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    ends = [(end.name, end.shape) for end in (*session.get_inputs(), *session.get_outputs())]
    assert ends == [("images", ["batch", 3, 16, 16]), ("features", ["batch", 16])]


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 1), (1, 1)), ((0, 1), (2, 0))])
def test_onnx_pads_the_max_pools_of_flax(padding, tmp_path):
    import flax.linen as nn

    deploy, original = runtime("onnx"), nn.max_pool

    def function(x):
        x = nn.max_pool(-jnp.square(x), window_shape=(3, 3), strides=(2, 2), padding=padding)
        return x.reshape(x.shape[0], -1)

    deploy.write(function, 8, tmp_path / "network")
    assert_same(deploy.run(tmp_path / "network", images(2, 8)), function(images(2, 8)))
    assert nn.max_pool is original


def test_onnx_without_its_packages_names_the_extra(monkeypatch, tmp_path):
    for name in ("jax2onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(errors.UserError, match=r"jax2onnx.*pip install \"disco-jax\[onnx\]\""):
        onnx.write(lambda x: x, 16, tmp_path / "network")
    (tmp_path / "network").write_bytes(b"")
    with pytest.raises(errors.UserError, match=r"onnxruntime.*pip install \"disco-jax\[onnx\]\""):
        onnx.run(tmp_path / "network", images(1, 16))


def test_onnx_refuses_what_one_file_cannot_hold(monkeypatch, tmp_path):
    runtime("onnx")
    monkeypatch.setattr(onnx, "_MAX_BYTES", 100)
    with pytest.raises(errors.UserError, match="2 GiB"):
        onnx.write(resnet(), 16, tmp_path / "network")
    assert not list(tmp_path.iterdir())


def test_int8_weights_are_a_quarter_of_the_size_and_close(tmp_path):
    runtime("tflite")
    function, x = jax.jit(resnet(width=32)), images(3, 16)
    tflite.write(function, 16, tmp_path / "full")
    tflite.write(function, 16, tmp_path / "int8", int8=True)
    full, small = ((tmp_path / name).stat().st_size for name in ("full", "int8"))
    assert small < 0.35 * full
    expected = function(x)
    assert_same(tflite.run(tmp_path / "int8", x), expected, 0.1)
    assert helpers.relative_error(tflite.run(tmp_path / "int8", x), expected) > 1e-5


def test_tflite_falls_back_on_litert(monkeypatch, tmp_path):
    runtime("tflite")
    import tensorflow as tf

    tflite.write(resnet(), 16, tmp_path / "network")
    expected = tflite.run(tmp_path / "network", images(2, 16))
    monkeypatch.setattr(tf, "lite", object())
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "ai_edge_litert", None)
        with pytest.raises(errors.UserError, match="pip install ai-edge-litert"):
            tflite.run(tmp_path / "network", images(2, 16))
    pytest.importorskip("ai_edge_litert.interpreter")
    assert_same(tflite.run(tmp_path / "network", images(2, 16)), expected)


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("when", ["traced", "replaced"])
def test_a_failure_leaves_what_was_there(name, when, monkeypatch, tmp_path):
    deploy = runtime(name)
    path = tmp_path / "network"
    path.write_bytes(b"before")

    def broken(*args):
        raise RuntimeError("broken")

    if when == "replaced":
        monkeypatch.setattr(files.os, "replace", broken)
    with pytest.raises(RuntimeError, match="broken"):
        deploy.write(broken if when == "traced" else lambda x: x[:, 0, 0], 16, path)
    assert [file.name for file in tmp_path.iterdir()] == ["network"]
    assert path.read_bytes() == b"before"


def test_versions_that_do_not_go_together_are_told(monkeypatch, tmp_path, capfd):
    pytest.importorskip("jax2onnx")
    import jax2onnx

    def behind(*args, **kwargs):
        raise AttributeError("module 'jax._src.core' has no attribute 'Name'")

    monkeypatch.setattr(jax2onnx, "to_onnx", behind)
    with pytest.raises(errors.UserError, match=f"does not support jax {jax.__version__} .*'Name'"):
        onnx.write(resnet(), 16, tmp_path / "network")

    def unknown(*args, **kwargs):
        raise NotImplementedError("No plugins registered for primitive 'new'")

    monkeypatch.setattr(jax2onnx, "to_onnx", unknown)
    with pytest.raises(errors.UserError, match=r"primitive 'new'.*pip install \"jax<0.11\""):
        onnx.write(resnet(), 16, tmp_path / "network")
    tf = pytest.importorskip("tensorflow")
    monkeypatch.setattr(tf.lite.TFLiteConverter, "from_concrete_functions", lambda *_: Behind())
    with pytest.raises(errors.UserError, match=f"cannot translate .* jax {jax.__version__}"):
        tflite.write(resnet(), 16, tmp_path / "network")
    assert list(tmp_path.iterdir()) == [] and "megabytes" not in capfd.readouterr().err
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


class Behind:
    """A converter that fails on an unknown operation."""

    def convert(self):
        os.write(2, b"megabytes of what it met")
        raise ValueError("neither a custom op nor a flex op")
