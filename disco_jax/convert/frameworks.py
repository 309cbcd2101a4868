"""Exported weights, run in timm or torchvision themselves, in a process of their own.

PyTorch and TensorFlow bring compilers that abort when they meet in one process; this file is also
the program of the other process, and imports nothing of this package.
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
    """Whether a framework of `FRAMEWORKS` can be run here."""
    return all(importlib.util.find_spec(name) for name in ("torch", framework))


def features(framework: str, model: str, path: os.PathLike, images: np.ndarray) -> np.ndarray:
    """What a model of a framework makes of images with the weights of a file.

    Args:
      framework: one of `FRAMEWORKS`; must be installed.
      model: its name there.
      path: a state dict without a classifier, `.pth` or `.safetensors`.
      images: f32[B, H, W, 3], normalised.

    Returns:
      f32[B, F], what its classifier would read.

    Raises:
      RuntimeError: the weights do not load strictly, or anything else there.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, made = pathlib.Path(folder, "images.npy"), pathlib.Path(folder, "features.npy")
        np.save(given, images)
        words = [framework, model, str(path), str(given), str(made)]
        # -P: what stands beside this file must not hide packages of the same name.
        child = subprocess.run(
            [sys.executable, "-P", __file__, *words], capture_output=True, text=True, check=False
        )
        if child.returncode:
            raise RuntimeError(f"{framework} could not run {path}:\n{child.stderr[-2000:]}")
        return np.load(made)


def _main(framework: str, model: str, path: str, given: str, made: str) -> None:
    import torch

    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, weights_only=True)
    built = _without_classifier(framework, model)
    built.load_state_dict(state, strict=True)
    images = torch.from_numpy(np.load(given).transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        np.save(made, built.eval()(images).numpy())


def _without_classifier(framework: str, model: str):
    if framework == "timm":
        import timm

        return timm.create_model(model, num_classes=0)
    import torch
    import torchvision

    built = torchvision.models.get_model(model)
    if model.startswith("mobilenet_v3"):
        built.classifier[3] = torch.nn.Identity()  # the layers before are features
    elif hasattr(built, "fc"):
        built.fc = torch.nn.Identity()
    else:
        built.classifier = torch.nn.Identity()
    return built


if __name__ == "__main__":
    _main(*sys.argv[1:])
