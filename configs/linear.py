r"""Linear probe of a run on frozen features.

    disco-jax linear --workdir RUN [--config.learning_rate.per_256=3.0]
    disco-jax linear --workdir RUN --config configs/linear.py:protocol=disco,student=resnet18

`cached`, the default, extracts the features once from the centre crop: minutes instead of hours.
The others are the papers' protocols, with random crops and flips; their rates are those of the
`student` named, which the run must then have. `grid` tries many rates and weight decays at once,
`grid_crops` with random crops and flips.
"""

from typing import Any

from disco_jax.configs import common
from disco_jax.errors import unknown

# What each protocol changes of `moco`.
PROTOCOLS: dict[str, dict[str, Any]] = {
    # Without augmentation; the rest as MoCo, whose command has the rate 30, trains.
    "cached": dict(augment="none"),
    "moco": {},
    # DisCo, RETRO: 30 for ResNets, 3 for EfficientNets and MobileNets (disagreement D7).
    "disco": {},
    # The default of DisCo's code (disagreement D6).
    "disco_code": {
        "learning_rate.milestones": (5, 10, 15, 20, 25, 30, 35, 40, 45, 60, 80),
        "learning_rate.factor": 0.5,
    },
    # Five epochs of warm-up to the rate at a batch of 256 (disagreement S2).
    "seed": {"learning_rate.warmup_epochs": 5},
    "swav": {
        "learning_rate.per_256": 0.3,
        "learning_rate.decay": "cosine",
        "optimizer.weight_decay": 1e-6,
        "evaluate_every_epochs": 1,  # SwAV reports the best
    },
    "dino": {
        "batch_size": 1024,
        "network": "momentum",
        "learning_rate.per_256": 0.001,
        "learning_rate.decay": "cosine",
        "data.interpolation": "bilinear",
    },
    # Its evaluation resizes bicubically (disagreement L6: the student network).
    "sslight": {
        "batch_size": 4096,
        "learning_rate.per_256": 0.05,
        "learning_rate.decay": "cosine_after",
        "learning_rate.minimum": 1e-6,
        "data.interpolation": "bicubic",
        # Biases keep their gradient as it is.
        "optimizer": dict(
            name="lars", momentum=0.9, weight_decay=0.0, trust=1e-3, no_trust=("vectors",)
        ),
    },
    "compress": {
        "normalise": True,
        "total_epochs": 40,
        "learning_rate.per_256": 0.01,
        "learning_rate.milestones": (15, 30),
        "optimizer.weight_decay": 1e-4,
    },
    "grid": {
        "augment": "none",
        "learning_rate.decay": "cosine",
        "learning_rate.every": "step",
        "grid.rates": tuple(10.0 ** (i / 2) for i in range(-4, 4)),
        "grid.weight_decays": (0.0, 1e-5, 1e-4),
        "total_epochs": 30,
    },
}
# The same search, images cropped and mirrored anew in every epoch.
PROTOCOLS["grid_crops"] = {**PROTOCOLS["grid"], "augment": "linear"}
SMALL = ("efficientnet", "mobilenet")


def get_config(arg=None):
    arg = common.parse(arg, protocol="cached", student="")
    if arg.protocol not in PROTOCOLS:
        raise unknown("The recipe's argument protocol", arg.protocol, PROTOCOLS)
    config = common.classification("linear")
    if arg.protocol != "cached":
        config.name = f"linear_{arg.protocol}"
    config.student = arg.student
    for field, value in PROTOCOLS[arg.protocol].items():
        if field == "optimizer":
            config.optimizer = value
        else:
            config.update_from_flattened_dict({field: value})
    if arg.protocol in ("disco", "seed", "cached") and arg.student.startswith(SMALL):
        config.learning_rate.per_256 = 3.0
    if arg.protocol == "seed":  # constant, as at a batch of 256 from the rate to the rate
        config.learning_rate.warmup_from = config.learning_rate.per_256
    if arg.protocol in ("dino", "sslight") and arg.student.startswith("vit"):
        config.blocks = 4
    if arg.protocol == "sslight" and common.is_transformer(arg.student):
        config.batch_size = 1024
        config.learning_rate.per_256 = 0.01
        config.optimizer = dict(name="sgd", momentum=0.9, weight_decay=0.0)
    return config
