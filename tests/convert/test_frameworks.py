"""Weights of timm's and torchvision's own models in and out, compared with those frameworks.

Skipped where they are not installed: `pip install "disco-jax[torch]"`.
"""

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import helpers
from disco_jax import convert
from disco_jax.convert import frameworks, pickles, save

MODELS = {
    "timm": {
        "resnet18": "resnet18",
        "resnet50": "resnet50",
        "efficientnet_b0": "efficientnet_b0",
        "efficientnet_b1": "efficientnet_b1",
        "tf_efficientnet_b0": "tf_efficientnet_b0",
        "mobilenetv2_100": "mobilenetv2",
        "mobilenetv3_large_100": "mobilenetv3_large",
        "vit_tiny_patch16_224": "vit_tiny_p16",
        "xcit_tiny_12_p16_224": "xcit_tiny_12_p16",
    },
    "torchvision": {
        "resnet18": "resnet18",
        "mobilenet_v2": "mobilenetv2",
        "mobilenet_v3_large": "mobilenetv3_large_tv",
        "efficientnet_b0": "efficientnet_b0",
    },
}
CASES = [(framework, name) for framework, names in MODELS.items() for name in names]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function: framework -> folder of its models, made once."""
    folders = {}

    def make(framework):
        if not frameworks.installed(framework):
            pytest.skip(f"{framework} is not installed")
        if framework not in folders:
            folder = tmp_path_factory.mktemp(framework)
            program = pathlib.Path(__file__).with_name("their_models.py")
            words = [framework, str(folder), *MODELS[framework]]
            subprocess.run([sys.executable, "-P", str(program), *words], check=True)
            folders[framework] = folder
        return folders[framework]

    return make


def classifier(path, found):
    """Weight and bias of the layer that a model ends with; an XCiT's, too, is called head."""
    state, _ = convert.read(path)
    (root,) = found.classifiers
    names = [name for name in state if name.startswith(f"{root}.") and name not in found.keys]
    return tuple(state[next(n for n in names if n.endswith(leaf))] for leaf in ("weight", "bias"))


@pytest.mark.parametrize("framework, name", CASES)
def test_their_weights_compute_the_same_here_and_go_back(framework, name, made, tmp_path):
    folder, ours = made(framework), MODELS[framework][name]
    found = convert.read_network(folder / f"{name}.pth", arch=ours)
    assert found.spec["backbone"] == ours and found.spec["head"] == "none"
    with np.load(folder / f"{name}.npz") as recorded:
        images, logits = recorded["images"], recorded["logits"]
    apply = jax.jit(lambda v, x: found.encoder.apply(v, x, norm="running"))
    out = apply(found.variables, images)
    weight, bias = classifier(folder / f"{name}.pth", found)
    assert helpers.relative_error(out.features @ weight.T + bias, logits) < 1e-4

    saved = save.state_dict(ours, found.encoder, found.variables, framework)
    assert saved.model == name
    exported = tmp_path / "exported.pth"
    save.write(exported, saved, framework)
    original = pickles.read(folder / f"{name}.pth")
    again = pickles.read(exported)
    assert not again.keys() - original.keys()
    for key, value in again.items():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(value, original[key], err_msg=key)
    theirs = frameworks.features(framework, name, exported, images)
    assert helpers.relative_error(out.features, theirs) < 1e-4


@pytest.mark.parametrize("framework", MODELS)
def test_another_epsilon_is_worked_into_the_variances(framework, made, tmp_path):
    """torchvision's MobileNetV3 adds 1e-3 to variances, timm's 1e-5; weights go both ways."""
    source = {"timm": "torchvision", "torchvision": "timm"}[framework]
    name = {"timm": "mobilenetv3_large_100", "torchvision": "mobilenet_v3_large"}
    found = convert.read_network(made(source) / f"{name[source]}.pth")
    saved = save.state_dict(found.spec["backbone"], found.encoder, found.variables, framework)
    assert any("epsilon" in note for note in saved.notes)
    path = tmp_path / "exported.safetensors"
    save.write(path, saved, framework)
    made(framework)  # skips where it is not installed
    images = np.random.default_rng(0).standard_normal((2, 96, 96, 3)).astype(np.float32)
    apply = jax.jit(lambda v, x: found.encoder.apply(v, x, norm="running"))
    out = apply(found.variables, images)
    theirs = frameworks.features(framework, name[framework], path, images)
    assert helpers.relative_error(out.features, theirs) < 1e-4


def test_weights_that_do_not_load_there_are_told(made, tmp_path):
    made("timm")
    path = tmp_path / "broken.pth"
    pickles.write(path, {"conv1.weight": np.zeros((1, 1), np.float32)})
    with pytest.raises(RuntimeError, match=r"timm could not run .*broken.pth"):
        frameworks.features("timm", "resnet18", path, np.zeros((1, 32, 32, 3), np.float32))
