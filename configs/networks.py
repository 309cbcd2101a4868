"""Sections of a pretraining config for its networks: student, momentum network, teacher."""

from typing import Any


def encoder(stem: str) -> dict[str, Any]:
    """Returns the fields of a backbone and its head, which student and teacher share."""
    return dict(
        backbone="resnet18",
        width=0,  # channels of the first stage; 0: the backbone's default
        stem=stem,  # imagenet | small
        zero_init_residual=False,  # true: as timm initialises ResNets (disagreement M4)
        grid=0,  # patches a side in a ViT's position embedding; 0: the backbone's default
        patch=0,  # side of a ViT's or XCiT's patches in px; 0: the backbone's default
        drop_path=0.0,  # stochastic depth rate of a ViT or XCiT during training
        # Images that share BatchNorm statistics. 0: all of a device, or with norm="sync" of all
        # devices. Only with "sync" may a group span devices.
        norm_group=0,
        adapter=0,  # width of a linear layer between backbone and head; 0: none
        # mlp | mlp_bn | mlp_bn_all | mlp_unit | mlp_narrow | swav | swav_narrow | dino | dino_bn
        # | regression | none
        head="mlp",
        hidden=2048,  # width of the head; 0: one linear layer, -1: the width of the features
        layers=0,  # linear layers of the head; 0: its default, which is three for DINO, else two
        dim=128,  # width of the embedding
        prototypes=(),  # prototypes in each set of prototypes behind the head
        predictor=0,  # width of BYOL's predictor behind the head; 0: none
    )


def student(stem: str) -> dict[str, Any]:
    """Returns the section `config.student`."""
    return dict(
        encoder(stem),
        norm="local",  # BatchNorm statistics: local | sync | shuffle | running
        reuse=(),  # ("head",): a frozen copy of the teacher's head behind a learned adapter
        # Initial weights of the student and its EMA copy: the directory of a run or of an import,
        # or a PyTorch checkpoint; "": random. A resumed run does not read them again.
        weights="",
        start="backbone",  # the part of `weights` that is loaded: backbone | all (with the head)
        network="student",  # the network of a run that is loaded: student | momentum
    )


def momentum() -> dict[str, Any]:
    """Returns the section `config.momentum`."""
    return dict(
        ema_rate=0.999,  # weight of the old parameters in each EMA update
        ema_rate_end=-1.0,  # the rate at the end of the run, along half a cosine; -1: constant
        # time of the EMA update: before the momentum network encodes | after the optimizer's step
        follow="before",
        norm="shuffle",  # BatchNorm statistics: local | sync | shuffle | running
    )


def teacher(stem: str) -> dict[str, Any]:
    """Returns the section `config.teacher`."""
    return dict(
        encoder(stem),
        norm="local",  # BatchNorm statistics: local | sync | shuffle | running
        head="auto",  # auto: every field but the backbone's name comes from the weights
        # The directory of a run or of an import, or a PyTorch checkpoint; random: untrained.
        weights="",
        network="student",  # the network of a run that teaches: student | momentum
        mean=(),  # normalisation of its images; (): as stored with the weights, else augment.mean
        std=(),  # as mean
        cache="",  # a folder of `disco-jax cache` with its outputs, which replace its forward pass
    )
