r"""Linear probe of a run on frozen features.

    disco-jax linear --workdir RUN
    disco-jax linear --workdir RUN --config configs/linear.py:protocol=cached
    disco-jax linear --workdir RUN --config configs/linear.py:protocol=disco,student=resnet18

Without a protocol, a run on ImageNet has the one of its paper (`probes.protocol_for`), with random
crops and flips, and a run on other images `cached`. That extracts the features of the centre crops
once, which takes minutes instead of hours, and no paper reports it. Rates, transformer blocks and
the optimizer follow from the run's backbone, which `student` states: a run of another backbone is
refused. `grid` tries many rates and weight decays at once; `grid_crops` does so with random crops
and flips.
"""

from typing import Any

from disco_jax.configs import common, probes
from disco_jax.errors import unknown

# Protocol -> fields that differ from `moco`.
PROTOCOLS: dict[str, dict[str, Any]] = {
    # Without augmentation.
    "cached": dict(augment="none"),
    # Rate 30, divided by 10 at 60 and 80 of 100 epochs (main_lincls.py).
    "moco": {},
    # DisCo and RETRO: the rate of the student's family, 30 or 3 (disagreement D7).
    "disco": {},
    # Defaults of DisCo's official code (disagreement D6).
    "disco_code": {
        "learning_rate.milestones": (5, 10, 15, 20, 25, 30, 35, 40, 45, 60, 80),
        "learning_rate.factor": 0.5,
    },
    # The rate is constant during the warm-up at a batch of 256 (disagreement S2).
    "seed": {"learning_rate.warmup_epochs": 5},
    # Official code (eval_linear.py).
    "swav": {
        "learning_rate.base_lr": 0.3,
        "learning_rate.decay": "cosine",
        "optimizer.weight_decay": 1e-6,
        "evaluate_every_epochs": 1,  # SwAV reports the best epoch
    },
    # Official code (eval_linear.py): the EMA copy, bilinear crops, tests resized bicubically.
    "dino": {
        "batch_size": 1024,
        "network": "momentum",
        "learning_rate.base_lr": 0.001,
        "learning_rate.decay": "cosine",
        "data.interpolation": "bilinear",
        "data.eval_interpolation": "bicubic",
    },
    # Table 8; the code resizes bicubically and scores the student (disagreement L6).
    "sslight": {
        "batch_size": 4096,
        "learning_rate.base_lr": 0.05,
        "learning_rate.decay": "cosine_after",
        "learning_rate.minimum": 1e-6,
        "data.interpolation": "bicubic",
        # The bias has no trust ratio.
        "optimizer": dict(
            name="lars", momentum=0.9, weight_decay=0.0, trust=1e-3, no_trust=("vectors",)
        ),
    },
    # Official code (eval_linear.py), also SimReg's.
    "compress": {
        "normalise": True,
        "total_epochs": 40,
        "learning_rate.base_lr": 0.01,
        "learning_rate.milestones": (15, 30),
        "optimizer.weight_decay": 1e-4,
    },
    # Official code (main_lincls.py, scripts/lincls): 120 epochs, the rate ends at a 3000th.
    "bingo": {"total_epochs": 120, "learning_rate.decay": "cosine_after"},
    # Official code.
    "ressl": {
        "learning_rate.base_lr": 0.3,
        "learning_rate.decay": "cosine",
        "learning_rate.every": "step",
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
# The same search, with new crops and flips in each epoch.
PROTOCOLS["grid_crops"] = {**PROTOCOLS["grid"], "augment": "linear"}
# Protocols with the rate of the student's family.
BY_FAMILY = ("cached", "disco", "seed", "bingo")
# Protocols with which a paper evaluates its own runs; see `probes.TESTBEDS`.
OF_PAPERS = ("disco", "seed", "swav", "dino", "sslight", "compress", "bingo", "ressl")


def follow_rate(config):
    """Sets the rates that are fractions of `config.learning_rate.base_lr`, in place."""
    rate = config.learning_rate
    if config.protocol in ("linear:seed", "semi:seed"):  # constant in the warm-up: disagreement S2
        rate.warmup_from = rate.base_lr
    if config.protocol == "linear:bingo":  # 30 -> 0.01, 3 -> 0.001
        rate.minimum = rate.base_lr / 3000


def get_config(arg=None):
    arg = common.parse(arg, protocol="cached", student="", network="")
    if arg.protocol not in PROTOCOLS:
        raise unknown("The recipe's argument protocol", arg.protocol, PROTOCOLS)
    config = probes.classification("linear")
    if arg.protocol != "cached":
        config.name = f"linear_{arg.protocol}"
    config.protocol, config.student = f"linear:{arg.protocol}", arg.student
    for field, value in PROTOCOLS[arg.protocol].items():
        if field == "optimizer":
            config.optimizer = value
        else:
            config.update_from_flattened_dict({field: value})
    if arg.network:
        config.network = arg.network
    if arg.protocol in BY_FAMILY:
        config.learning_rate.base_lr = probes.base_rate(arg.student)
    follow_rate(config)
    if arg.protocol in ("dino", "sslight") and common.readable_blocks(arg.student) > 1:
        config.blocks = 4
    if arg.protocol == "sslight" and common.is_transformer(arg.student):
        config.batch_size = 1024
        config.learning_rate.base_lr = 0.01
        config.optimizer = dict(name="sgd", momentum=0.9, weight_decay=0.0)
    return config
