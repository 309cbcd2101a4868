"""Runs exported weights in timm or torchvision, in a separate process.

PyTorch and TensorFlow contain compilers that abort when both are loaded in one process. This file
is also the program of the other process, so it imports nothing from this package.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

FRAMEWORKS = ("timm", "torchvision")


def installed(framework: str) -> bool:
    """Returns whether a framework of `FRAMEWORKS` can be run here."""
    return all(importlib.util.find_spec(name) for name in ("torch", framework))


def features(framework: str, model: str, path: os.PathLike, images: np.ndarray) -> np.ndarray:
    """Computes features with a framework's model and the weights of a file.

    Args:
      framework: one of `FRAMEWORKS`; must be installed.
      model: the model's name in the framework.
      path: a state dict without a classifier, `.pth` or `.safetensors`.
      images: f32[B, H, W, 3], normalised.

    Returns:
      f32[B, F], the input of the model's classifier.

    Raises:
      RuntimeError: the weights do not load strictly, or the process fails in another way.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = pathlib.Path(folder, "images.npy"), pathlib.Path(folder, "features.npy")
        np.save(inputs, images)
        arguments = [framework, model, str(path), str(inputs), str(outputs)]
        # -P: modules beside this file must not shadow packages of the same name.
        process = subprocess.run(
            [sys.executable, "-P", __file__, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode:
            raise RuntimeError(f"{framework} could not run {path}:\n{process.stderr[-2000:]}")
        return np.load(outputs)


def _main(framework: str, model: str, path: str, inputs: str, outputs: str) -> None:
    import torch

    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, weights_only=True)
    network = _without_classifier(framework, model)
    network.load_state_dict(state, strict=True)
    images = torch.from_numpy(np.load(inputs).transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        np.save(outputs, network.eval()(images).numpy())


def _without_classifier(framework: str, model: str):
    if framework == "timm":
        import timm

        return timm.create_model(model, num_classes=0)
    import torch
    import torchvision

    network = torchvision.models.get_model(model)
    # Only the last linear layer: earlier ones of a classifier belong to the backbone here.
    layers = network.named_modules()
    last = [name for name, layer in layers if isinstance(layer, torch.nn.Linear)][-1]
    parent, _, child = last.rpartition(".")
    setattr(network.get_submodule(parent), child, torch.nn.Identity())
    return network


if __name__ == "__main__":
    _main(*sys.argv[1:])
