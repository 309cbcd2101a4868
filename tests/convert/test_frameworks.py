"""Weights of timm's and torchvision's models in and out, compared with those frameworks.

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
def models_of(tmp_path_factory):
    """A function: framework -> folder with its models, which are created once."""
    folders = {}

    def folder_of(framework):
        if not frameworks.installed(framework):
            pytest.skip(f"{framework} is not installed")
        if framework not in folders:
            folder = tmp_path_factory.mktemp(framework)
            program = pathlib.Path(__file__).with_name("framework_models.py")
            arguments = [framework, str(folder), *MODELS[framework]]
            subprocess.run([sys.executable, "-P", str(program), *arguments], check=True)
            folders[framework] = folder
        return folders[framework]

    return folder_of


def classifier(path, imported):
    """Returns weight and bias of a model's last layer."""
    state, _ = convert.read(path)
    (root,) = imported.classifiers
    names = [name for name in state if name.startswith(f"{root}.") and name not in imported.keys]
    return tuple(state[next(n for n in names if n.endswith(leaf))] for leaf in ("weight", "bias"))


@pytest.mark.parametrize("framework, name", CASES)
def test_their_weights_compute_the_same_here_and_go_back(framework, name, models_of, tmp_path):
    folder, backbone = models_of(framework), MODELS[framework][name]
    imported = convert.read_network(folder / f"{name}.pth", arch=backbone)
    assert imported.spec["backbone"] == backbone and imported.spec["head"] == "none"
    with np.load(folder / f"{name}.npz") as recorded:
        images, logits = recorded["images"], recorded["logits"]
    apply = jax.jit(lambda v, x: imported.encoder.apply(v, x, norm="running"))
    out = apply(imported.variables, images)
    weight, bias = classifier(folder / f"{name}.pth", imported)
    assert helpers.relative_error(out.features @ weight.T + bias, logits) < 1e-4

    saved = save.state_dict(backbone, imported.encoder, imported.variables, framework)
    assert saved.model == name
    exported = tmp_path / "exported.pth"
    save.write(exported, saved, framework)
    original = pickles.read(folder / f"{name}.pth")
    again = pickles.read(exported)
    assert not again.keys() - original.keys()
    for key, value in again.items():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(value, original[key], err_msg=key)
    features = frameworks.features(framework, name, exported, images)
    assert helpers.relative_error(out.features, features) < 1e-4


@pytest.mark.parametrize("framework", MODELS)
def test_another_epsilon_is_worked_into_the_variances(framework, models_of, tmp_path):
    """Converts both ways: torchvision's MobileNetV3 adds 1e-3 to variances, timm's adds 1e-5."""
    source = {"timm": "torchvision", "torchvision": "timm"}[framework]
    name = {"timm": "mobilenetv3_large_100", "torchvision": "mobilenet_v3_large"}
    imported = convert.read_network(models_of(source) / f"{name[source]}.pth")
    saved = save.state_dict(
        imported.spec["backbone"], imported.encoder, imported.variables, framework
    )
    assert any("epsilon" in note for note in saved.notes)
    path = tmp_path / "exported.safetensors"
    save.write(path, saved, framework)
    models_of(framework)  # skips if it is not installed
    images = np.random.default_rng(0).standard_normal((2, 96, 96, 3)).astype(np.float32)
    apply = jax.jit(lambda v, x: imported.encoder.apply(v, x, norm="running"))
    out = apply(imported.variables, images)
    features = frameworks.features(framework, name[framework], path, images)
    assert helpers.relative_error(out.features, features) < 1e-4


def test_weights_that_do_not_load_there_are_told(models_of, tmp_path):
    models_of("timm")
    path = tmp_path / "broken.pth"
    pickles.write(path, {"conv1.weight": np.zeros((1, 1), np.float32)})
    with pytest.raises(RuntimeError, match=r"timm could not run .*broken.pth"):
        frameworks.features("timm", "resnet18", path, np.zeros((1, 32, 32, 3), np.float32))
