"""Fields of evaluations of a run, with their defaults."""

from typing import Any

from ml_collections import ConfigDict


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
        subset="",  # a text file with one file name a line: training reads only these images
        splits="",  # as in a run; "" for another data set: the names of the folders decide
        labels="",  # as in a run; "" for another data set: none
        range="",  # as in a run; "" for another data set: full
        size=0,  # px
        eval_resize=-1,  # shorter side in px before the centre crop; 0: resize straight to `size`
        interpolation="",  # bilinear | bicubic
    )


def classification(name: str) -> ConfigDict:
    """Returns every field of a training with labels: linear probes and fine-tuning.

    Args:
      name: see `evaluation`.
    """
    config = evaluation(name)
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
    config.labelled = dict(percent=0.0, per_class=0, seed=0)
    config.optimizer = dict(name="sgd", momentum=0.9, weight_decay=0.0, nesterov=False)
    config.head_rate = 1.0  # learning rate of the classifier divided by that of the network
    config.learning_rate = _learning_rate()
    # Searches a grid of rates and weight decays instead, trained side by side on frozen features.
    # The best one on a held-out part of the training images is tested.
    config.grid = dict(rates=(), weight_decays=(), held_out_percent=10.0)
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
        base_lr=30.0,
        decay="steps",
        every="epoch",
        milestones=(60, 80),
        factor=0.1,
        minimum=0.0,  # last rate of "cosine_after"
        warmup_epochs=0,
        warmup_from=0.0,
    )


def base_rate(backbone: str) -> float:
    """Returns the rate of DisCo's, SEED's and RETRO's probes of a backbone."""
    return 3.0 if backbone.startswith(("efficientnet", "mobilenet")) else 30.0
