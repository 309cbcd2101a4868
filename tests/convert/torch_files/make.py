"""Makes zip.pth and stream.pth with PyTorch: the same checkpoint in its two formats.

Run `python tests/convert/torch_files/make.py`; the files committed are those of PyTorch 2.13.
`test_pickles.py` contains the expected content.
"""

import argparse
import collections
import pathlib

import torch


def checkpoint():
    """Returns a small training state with every kind of tensor that occurs in checkpoints."""
    shared = torch.arange(10, dtype=torch.float32)
    state = collections.OrderedDict(
        {
            "float32": torch.tensor([[0.5, -1.0, 2.0], [3.0, 4.0, 5.25]]),
            "float16": torch.tensor([1.0, -0.5, 65504.0], dtype=torch.float16),
            "bfloat16": torch.tensor([1.0, -0.5, 3.0e38], dtype=torch.bfloat16),
            "int64": torch.tensor(7),
            "bool": torch.tensor([True, False, True]),
            "empty": torch.zeros(0, 3),
            "transposed": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
            "head": shared[:4],
            "tail": shared[4:].reshape(2, 3),
            "parameter": torch.nn.Parameter(torch.tensor([9.0, 8.0])),
        }
    )
    state._metadata = {"": {"version": 1}}
    return {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": state,
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.tensor([0.25, 0.75])}},
            "param_groups": [{"lr": 0.03, "nesterov": False, "params": [0, 1]}],
        },
        "args": argparse.Namespace(lr=0.03, milestones=[120, 160], cos=True, resume=""),
    }


if __name__ == "__main__":
    folder = pathlib.Path(__file__).parent
    torch.save(checkpoint(), folder / "zip.pth")
    torch.save(checkpoint(), folder / "stream.pth", _use_new_zipfile_serialization=False)
