"""Makes models of timm or torchvision with drawn weights: FOLDER/NAME.pth and FOLDER/NAME.npz.

A separate program, because PyTorch and TensorFlow cannot share a process.
Usage: python framework_models.py FRAMEWORK FOLDER MODEL...
"""

import pathlib
import sys

import numpy as np
import torch


def scramble(model):
    """Draws weights of ordinary size and BatchNorm statistics that are neither 0 nor 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if "pos_embed" in name or "cls_token" in name:
                value.normal_(std=0.5) if value.ndim == 3 else None
            elif value.ndim == 1:
                value.copy_(torch.rand_like(value) * 0.5 + 0.75)
                if name.endswith(("bias", "running_mean")):
                    value.sub_(1)
    return model.eval()


def make(framework, folder, name):
    if framework == "timm":
        import timm

        model = timm.create_model(name)
    else:
        import torchvision

        model = torchvision.models.get_model(name)
    scramble(model)
    torch.save(model.state_dict(), folder / f"{name}.pth")
    images = np.random.default_rng(0).standard_normal((2, 224, 224, 3)).astype(np.float32)
    with torch.inference_mode():
        logits = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    np.savez(folder / f"{name}.npz", images=images, logits=logits)


if __name__ == "__main__":
    for each in sys.argv[3:]:
        make(sys.argv[1], pathlib.Path(sys.argv[2]), each)
