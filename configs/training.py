"""Sections of a pretraining config for its training: speed, optimizer, logs and checkpoints."""

from typing import Any


def fast() -> dict[str, Any]:
    """Returns the section `config.fast`."""
    return dict(
        losses=True,  # read each queue once, in the compute dtype; false: in float32
        # queues of keys in bfloat16, which halves their memory; `similarity` keeps float32
        half_queue=False,
        # Queues of contrast, similarity and bags: each device stores the keys it made and compares
        # the queries of all devices with them. Divides the memory of a queue and the time to read
        # it by the number of devices.
        shard_queue=False,
        # how devices exchange images for shuffled BatchNorm: gather (each device receives all) |
        # all_to_all (each device receives what it needs; TPUs only) | auto (all_to_all on TPUs)
        exchange="auto",
        # the first convolution computes two columns at once, and a ResNet normalises the output of
        # its max-pool instead of the input; stored weights do not change
        stem=True,
        # pack neighbouring columns into the channels of the first layers, which fills a TPU's
        # lanes: four in EfficientNets and MobileNets, two in ResNets: on | off | auto (on TPUs)
        columns="auto",
        # compute the BatchNorm statistics behind a widening 1x1 convolution of the teacher and
        # the momentum network from the convolution's input: on | off | auto (on TPUs)
        statistics="auto",
        # compute depthwise, 1x1 and late convolutions and the gradient of a ResNet's max-pool as
        # sums and products of shifted maps, also in probes and `embed`: on | off | auto (on CPUs)
        shifts="auto",
        # store the teacher's kernels in the compute dtype, and fold its BatchNorm into the layers
        # before it where norm="running"
        teacher=True,
    )


def optimizer() -> dict[str, Any]:
    """Returns the section `config.optimizer`."""
    return dict(
        name="sgd",  # sgd | larc | lars | adamw
        momentum=0.9,  # of all optimizers but adamw
        weight_decay=1e-4,
        weight_decay_end=-1.0,  # weight decay at the end of the run, along half a cosine; -1: same
        no_decay=(),  # kinds of parameters without weight decay: "vectors", "depthwise"
        trust=1e-3,  # trust coefficient of larc and lars
        no_trust=(),  # kinds of parameters without the trust ratio of lars
        clip=0.0,  # largest norm of each parameter's gradient; 0: no clipping
        frozen_until=(),  # patterns of parameters, such as "prototypes/*", frozen at first
        frozen_steps=0,  # steps for which `frozen_until` holds; set this or frozen_epochs
        frozen_epochs=0,  # epochs for which `frozen_until` holds
        frozen=(),  # patterns of parameters that are never trained
        unit_norm=(),  # patterns of kernels whose columns are scaled to length 1 after each step
    )


def learning_rate() -> dict[str, Any]:
    """Returns the section `config.learning_rate`."""
    return dict(
        base_lr=0.03,  # peak for a global batch of 256; scales linearly with the batch
        # cosine (over the whole run) | cosine_after (from the end of the warm-up to `minimum`) |
        # steps | constant
        decay="cosine",
        every="epoch",  # the rate changes once an epoch, or every step
        milestones=(),  # epochs at which "steps" multiplies the rate by `factor`
        factor=0.1,
        minimum=0.0,  # last rate of "cosine_after"; does not scale with the batch
        warmup_epochs=0,  # length of a linear warm-up from warmup_from to the peak
        warmup_from=0.0,  # rate at step 0; does not scale with the batch
    )


def log() -> dict[str, Any]:
    """Returns the section `config.log`."""
    return dict(
        every_steps=50,
        tensorboard=True,  # event files of the run and its evaluations
        report=True,  # write the contact sheet of views at the start and report.html at the end
        replicas_every_steps=0,  # interval at which replicas are compared bit by bit; 0: never
        # seconds without a step after which the process ends; includes compilation, evaluation and
        # saving; 0: never
        hang_s=1800.0,
    )


def monitor() -> dict[str, Any]:
    """Returns the section `config.monitor`."""
    return dict(
        knn_every_steps=0,  # 0: never
        split="",  # "": data.eval_split
        images=5000,  # sampled evenly over the classes; 0: all
        k=20,
    )


def checkpoint() -> dict[str, Any]:
    """Returns the section `config.checkpoint`."""
    return dict(
        every_steps=1000,
        keep=3,  # newest checkpoints that are kept
        best_metric="loss",  # also keeps the checkpoint with the lowest value of it; "": none
    )
