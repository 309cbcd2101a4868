"""Fields of evaluations of a run with their defaults, and the papers' probe of each recipe."""

from typing import Any

from ml_collections import ConfigDict

# Recipe or family of an import (`config.name`) -> protocol of `linear.py` with which its paper
# evaluates it. All others are evaluated as in DisCo and RETRO, whose tables contain MoCo-v2 and the
# combinations with DisCo.
_VIEWS = ("baseline", "crop_scale", "pixel_scale")  # of SSLight's recipes, beside ours
TESTBEDS = {
    **{f"sslight_{m}_{v}": "sslight" for m in ("dino", "moco", "swav") for v in _VIEWS},
    "sslight_moco_two": "sslight",
    # SEED's own ablations.
    **dict.fromkeys(
        ("squared_distance", "online_clusters", "binary_contrast", "pseudo_labels", "seed_moco"),
        "seed",
    ),
    "seed": "seed",
    "seed_cross": "seed",
    "seed_to_large": "seed",
    "seed_small_patch": "seed",
    "swav": "swav",
    "swav_disco": "swav",
    "dino": "dino",
    "dino_disco": "dino",
    "sslight": "sslight",
    "sslight_dino": "sslight",
    "sslight_moco": "sslight",
    "sslight_swav": "sslight",
    "compress": "compress",
    "compress_1q": "compress",
    "compress_2q": "compress",
    "simreg": "compress",
    "bingo": "bingo",
    "ressl": "ressl",
}


def testbed(name: str) -> str:
    """Returns the protocol with which the paper of a recipe (`config.name`) evaluates it."""
    return TESTBEDS.get(name, "disco")


def protocol_for(config: ConfigDict) -> str:
    """Returns the linear probe of a run's paper, e.g. "linear:protocol=disco,student=resnet18".

    Args:
      config: config of a pretraining run or an import.
    """
    protocol = testbed(config.name)
    arguments = dict(protocol=protocol, student=config.student.backbone)
    if protocol == "dino" and not config.objectives.self_distill.weight:
        arguments["network"] = "student"  # an imported network has no EMA copy
    return "linear:" + ",".join(f"{name}={value}" for name, value in arguments.items())


def evaluation(name: str) -> ConfigDict:
    """Returns every field that all evaluations of a run share.

    Args:
      name: stem of the result files in the run's directory.
    """
    config = ConfigDict()
    config.name = name
    config.report = True  # rewrite the run's report.html
    config.network = "student"  # student | momentum
    config.output = "features"  # features | embedding | hidden (input of the head's last layer)
    config.blocks = 1  # ViTs: concatenate the class tokens of this many last blocks
    config.batch_size = 256
    # "", 0 and -1: as in the run. Another data set: name (TFDS), or dir (folder or .npz).
    config.data = _data()
    return config


def _data() -> dict[str, Any]:
    """Returns the section `config.data` of an evaluation."""
    return dict(
        source="",  # tfds | folder | npz
        name="",
        dir="",
        train_split="",
        eval_split="",
        # a text file with one file name a line: training reads only these images
        subset="",
        splits="",  # as in a run; "" for another data set: the names of the folders decide
        labels="",  # as in a run; "" for another data set: none
        range="",  # as in a run; "" for another data set: full
        size=0,  # px
        eval_resize=-1,  # shorter side in px before the centre crop; 0: resize straight to `size`
        interpolation="",  # filter of crops and of the resize in evaluations: bilinear | bicubic
        eval_interpolation="",  # filter of the resize in evaluations; "": the same
    )


def classification(name: str) -> ConfigDict:
    """Returns every field of a training with labels: linear probes and fine-tuning.

    Args:
      name: see `evaluation`.
    """
    config = evaluation(name)
    config.protocol = ""  # recipe and protocol, e.g. "linear:disco"; a label in the results
    config.student = ""  # the backbone that the config is made for; "": any
    config.seed = 0
    config.total_epochs = 100
    config.layers = "classifier"  # classifier | all
    config.norm = "running"  # BatchNorm statistics of the network: running | sync | local
    config.augment = "linear"  # linear (random crops and flips) | flip | none
    # scale each row to length 1, then standardise each dimension by its mean and deviation
    config.normalise = False
    config.init = "normal"  # normal: N(0, 0.01), bias 0 | torch: U(+-1/sqrt(fan_in))
    # A class-balanced part of the training split, in percent or images a class; 0: all images.
    # `listed` is the length of the papers' list, which `data.subset` must have on ImageNet.
    config.labelled = dict(percent=0.0, per_class=0, seed=0, listed=0)
    # Tests on that many training images of each class instead of the test images, and does not
    # train on them: the images on which SSLight chooses its settings; 0: off.
    config.held_out = dict(per_class=0, seed=0)
    config.optimizer = dict(name="sgd", momentum=0.9, weight_decay=0.0, nesterov=False)
    config.head_rate = 1.0  # learning rate of the classifier divided by that of the network
    config.learning_rate = _learning_rate()
    # Searches a grid of rates and weight decays instead, trained side by side on frozen features.
    # The best one on a held-out part of the training images is tested; with `folds`, the best mean
    # of a cross-validation with so many parts.
    config.grid = dict(rates=(), weight_decays=(), held_out_percent=10.0, folds=0)
    # Distils a teacher's classes beside the labels: weight is the share of that loss, teacher is
    # RUN/NAME of a linear probe or a fine-tuning.
    config.distill = dict(weight=0.0, teacher="", temperature=2.0, reduction="element")
    config.log_every_epochs = 10
    config.evaluate_every_epochs = 0  # on the test images; 0: once at the end
    config.checkpoint_every_epochs = 1  # only trainings that read images have checkpoints
    config.extract_batch_size = 256  # images that a host encodes at once
    return config


def _learning_rate() -> dict[str, Any]:
    """Returns the section `config.learning_rate` of MoCo's linear probe."""
    return dict(
        base_lr=30.0,  # for a batch of 256; 0: the `probe_rate` of the student's family
        decay="steps",
        every="epoch",
        milestones=(60, 80),
        factor=0.1,
        minimum=0.0,  # last rate of "cosine_after"
        warmup_epochs=0,
        warmup_from=0.0,
    )


def base_rate(backbone: str) -> float:
    """Returns the rate of DisCo's, SEED's and RETRO's probes of a backbone.

    Without a name it is 0: the evaluation then takes that of the run's backbone.
    """
    if not backbone:
        return 0.0
    from disco_jax import models  # imports JAX

    return models.probe_rate(backbone)
