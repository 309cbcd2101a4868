r"""Semi-supervised evaluation of a run: 1 % or 10 % of the labels.

    disco-jax semi --workdir RUN --config configs/semi.py:protocol=disco,percent=1,list=1percent.txt
    disco-jax semi --workdir RUN --config configs/semi.py:protocol=sslight,percent=10 \
        --config.data.name=imagenet2012_subset/10pct --config.labelled.percent=0

The papers train on the images in the lists that SimCLR released (imagenet_subsets/1percent.txt and
10percent.txt, of 12,811 and 128,116 file names): `list` reads them, and TFDS has the same images as
imagenet2012_subset. Without either, `labelled.seed` draws equally many images from each class,
which are not those of the papers. DisCo, SEED, RETRO and `bingo` (as RETRO describes it) train a
linear classifier; SSLight and SwAV train all layers, and SSLight keeps the head's hidden layers.
"""

from disco_jax.configs import common, linear, probes
from disco_jax.errors import UserError, unknown

PROTOCOLS = {
    # The official code: rate 3 for all backbones, halved at the milestones (disagreement D9).
    "disco": {"learning_rate.base_lr": 3.0, "learning_rate.factor": 0.5},
    # Appendix: centre crops and flips; the rate is constant during the warm-up (disagreement S2).
    "seed": {"augment": "flip", "learning_rate.warmup_epochs": 5},
    # Section 4.2: as SEED and DisCo; rates by backbone, divided by 10.
    "retro": {},
    # RETRO, section 4.2: BINGO's classifier has rate 10 (disagreement R9).
    "bingo": {"learning_rate.base_lr": 10.0},
    # Appendix B and the official code.
    "sslight": {
        "layers": "all",
        "norm": "sync",
        "output": "hidden",
        "init": "torch",
        "batch_size": 1024,
        "optimizer.nesterov": True,
        "learning_rate.base_lr": 0.03,
        "learning_rate.decay": "cosine_after",
        "learning_rate.minimum": 1e-6,
        "data.interpolation": "bicubic",
    },
    # Official code (eval_semisup.py).
    "swav": {
        "layers": "all",
        "norm": "sync",
        "total_epochs": 20,
        "learning_rate.milestones": (12, 16),
        "learning_rate.factor": 0.2,
        "evaluate_every_epochs": 1,
    },
}
# Percent of labels -> images in SimCLR's list.
LISTED = {1: 12_811, 10: 128_116}
# Percent of labels -> SSLight's epochs.
SSLIGHT_EPOCHS = {1: 60, 10: 30}
# Percent of labels -> SwAV's rates for the network and for the classifier.
SWAV_RATES = {1: (0.02, 5.0), 10: (0.01, 0.2)}


def get_config(arg=None):
    arg = common.parse(arg, protocol="disco", percent=1, student="", list="")
    if arg.protocol not in PROTOCOLS:
        raise unknown("The recipe's argument protocol", arg.protocol, PROTOCOLS)
    if arg.percent not in SSLIGHT_EPOCHS:
        raise UserError(
            f"The recipe's argument percent={arg.percent} must be 1 or 10, as in the papers; "
            "--config.labelled.percent takes any other share."
        )
    config = probes.classification(f"semi_{arg.protocol}_{arg.percent}")
    config.labelled.update(percent=float(arg.percent), listed=LISTED[arg.percent])
    if arg.list:
        config.data.subset, config.labelled.percent = arg.list, 0.0
    config.protocol, config.student = f"semi:{arg.protocol}", arg.student
    config.update_from_flattened_dict(PROTOCOLS[arg.protocol])
    if arg.protocol in ("seed", "retro"):
        config.learning_rate.base_lr = probes.base_rate(arg.student)
    linear.follow_rate(config)
    if arg.protocol == "sslight":
        config.total_epochs = SSLIGHT_EPOCHS[arg.percent]
    if arg.protocol == "swav":
        network, head = SWAV_RATES[arg.percent]
        config.learning_rate.base_lr, config.head_rate = network, head / network
    return config
