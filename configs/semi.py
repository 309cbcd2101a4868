r"""Semi-supervised evaluation of a run: 1 % or 10 % of the labels.

    disco-jax semi --workdir RUN --config configs/semi.py:protocol=disco,percent=1
    disco-jax semi --workdir RUN --config configs/semi.py:protocol=sslight,percent=10 \
        --config.data.subset=10percent.txt --config.labelled.percent=0

The labelled images are the same number of every class, chosen by `labelled.seed`; or those of a
list of file names, such as the lists that came with SimCLR. DisCo, SEED and RETRO train a linear
classifier; SSLight and SwAV all layers, SSLight's with the head's hidden layer kept.
"""

from disco_jax.configs import common
from disco_jax.errors import UserError, unknown

PROTOCOLS = {
    # The code halves the rate where it has 0.1 for ImageNet, and takes 3 for ResNets too (D9).
    "disco": {"learning_rate.per_256": 3.0, "learning_rate.factor": 0.5},
    # Without random crops; five epochs of warm-up from the rate to the rate.
    "seed": {"augment": "flip", "learning_rate.warmup_epochs": 5},
    "retro": {},
    "sslight": {
        "layers": "all",
        "norm": "sync",
        "output": "hidden",
        "init": "torch",
        "batch_size": 1024,
        "optimizer.nesterov": True,
        "learning_rate.per_256": 0.03,
        "learning_rate.decay": "cosine_after",
        "learning_rate.minimum": 1e-6,
        "data.interpolation": "bicubic",
    },
    "swav": {
        "layers": "all",
        "norm": "sync",
        "total_epochs": 20,
        "learning_rate.milestones": (12, 16),
        "learning_rate.factor": 0.2,
        "evaluate_every_epochs": 1,
    },
}
SMALL = ("efficientnet", "mobilenet")
# percent -> SSLight's epochs; SwAV's rates of the network and of the classifier.
SSLIGHT_EPOCHS = {1: 60, 10: 30}
SWAV_RATES = {1: (0.02, 5.0), 10: (0.01, 0.2)}


def get_config(arg=None):
    arg = common.parse(arg, protocol="disco", percent=1, student="")
    if arg.protocol not in PROTOCOLS:
        raise unknown("The recipe's argument protocol", arg.protocol, PROTOCOLS)
    if arg.percent not in SSLIGHT_EPOCHS:
        raise UserError(
            f"The recipe's argument percent={arg.percent} must be 1 or 10, as in the papers; "
            "--config.labelled.percent takes any other share."
        )
    config = common.classification(f"semi_{arg.protocol}_{arg.percent}")
    config.labelled.percent = float(arg.percent)
    config.student = arg.student
    config.update_from_flattened_dict(PROTOCOLS[arg.protocol])
    if arg.protocol in ("seed", "retro") and arg.student.startswith(SMALL):
        config.learning_rate.per_256 = 3.0
    if arg.protocol == "seed":
        config.learning_rate.warmup_from = config.learning_rate.per_256
    if arg.protocol == "sslight":
        config.total_epochs = SSLIGHT_EPOCHS[arg.percent]
    if arg.protocol == "swav":
        network, head = SWAV_RATES[arg.percent]
        config.learning_rate.per_256, config.head_rate = network, head / network
    return config
