"""Weights of timm's and torchvision's own models in and out, compared inside those frameworks.

Skipped where they are not installed: `pip install timm torchvision`.
"""

import jax
import numpy as np
import pytest

import helpers
from disco_jax import convert
from disco_jax.convert import save

torch = pytest.importorskip("torch")

TIMM = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "efficientnet_b0": "efficientnet_b0",
    "efficientnet_b1": "efficientnet_b1",
    "tf_efficientnet_b0": "tf_efficientnet_b0",
    "mobilenetv2_100": "mobilenetv2",
    "mobilenetv3_large_100": "mobilenetv3_large",
    "vit_tiny_patch16_224": "vit_tiny_p16",
    "xcit_tiny_12_p16_224": "xcit_tiny_12_p16",
}
TORCHVISION = {
    "resnet18": "resnet18",
    "mobilenet_v2": "mobilenetv2",
    "mobilenet_v3_large": "mobilenetv3_large_tv",
    "efficientnet_b0": "efficientnet_b0",
}


def scrambled(model):
    """Weights of ordinary size, and BatchNorm statistics that are not 0 and 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("running_var", "norm.weight")) or value.ndim == 1:
                value.copy_(torch.rand_like(value.float()) * 0.5 + 0.75)
                if name.endswith(("bias", "running_mean")):
                    value.sub_(1)
            elif not value.ndim:
                continue
            elif "pos_embed" in name or "cls_token" in name:
                value.normal_(std=0.5)
    return model.eval()


def library(name):
    return pytest.importorskip(name)


def theirs(name, kind):
    if kind == "timm":
        return library("timm").create_model(name)
    return library("torchvision").models.get_model(name)


def features(model, kind, images):
    """(pooled features, logits) of their model."""
    with torch.inference_mode():
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        if kind == "timm":
            found = model.forward_head(model.forward_features(x), pre_logits=True)
        else:
            found = None
        return found, model(x).numpy()


MODELS = [(n, "timm", ours) for n, ours in TIMM.items()]
MODELS += [(n, "torchvision", ours) for n, ours in TORCHVISION.items()]


@pytest.mark.parametrize("name, kind, ours", MODELS)
def test_their_weights_compute_the_same_here_and_go_back(name, kind, ours, tmp_path):
    model = scrambled(theirs(name, kind))
    path = tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    arch = ours if ours.startswith("tf_") else ""
    found = convert.read_network(path, arch=arch)
    assert found.spec["backbone"] == ours and found.spec["dim"] == 1000
    images = np.random.default_rng(0).standard_normal((2, 224, 224, 3)).astype(np.float32)
    out = jax.jit(lambda v, x: found.encoder.apply(v, x, norm="running"))(found.variables, images)
    pooled, logits = features(model, kind, images)
    assert helpers.relative_error(out.embedding, logits) < 1e-4
    if pooled is not None:
        assert helpers.relative_error(out.features, pooled.numpy()) < 1e-4

    saved = save.state_dict(ours, found.encoder, found.variables, kind, with_head=False)
    assert saved.model == name
    exported = tmp_path / "exported.pth"
    save.write(exported, saved, kind)
    again = torch.load(exported, weights_only=True)
    original = model.state_dict()
    assert not again.keys() - original.keys()
    for key, value in again.items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, original[key], rtol=0, atol=0)


@pytest.mark.parametrize("kind, epsilon", [("timm", 1e-3), ("torchvision", 1e-5)])
def test_another_epsilon_is_worked_into_the_variances(kind, epsilon, tmp_path):
    """torchvision's MobileNetV3 adds 1e-3 to variances, timm's 1e-5; weights go both ways."""
    other = {"timm": "torchvision", "torchvision": "timm"}[kind]
    names = {"timm": "mobilenetv3_large_100", "torchvision": "mobilenet_v3_large"}
    source = scrambled(theirs(names[other], other))
    state = {key: value.numpy() for key, value in source.state_dict().items()}
    found = convert.from_mapping(state)
    saved = save.state_dict(found.spec["backbone"], found.encoder, found.variables, kind)
    assert any("epsilon" in note for note in saved.notes)
    model = theirs(names[kind], kind)
    arrays = {key: torch.from_numpy(value) for key, value in saved.arrays.items()}
    missing, surplus = model.load_state_dict(arrays, strict=False)
    assert not surplus and all(key.startswith("classifier") for key in missing)
    images = np.random.default_rng(0).standard_normal((2, 96, 96, 3)).astype(np.float32)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    out = found.encoder.apply(found.variables, images, norm="running").features
    with torch.inference_mode():
        model.eval()
        if kind == "timm":
            expected = model.forward_head(model.forward_features(x), pre_logits=True)
        else:
            pooled = model.avgpool(model.features(x)).flatten(1)
            expected = model.classifier[1](model.classifier[0](pooled))
    assert helpers.relative_error(out, expected.numpy()) < 1e-4
