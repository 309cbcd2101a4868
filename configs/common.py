"""What recipes share: every field, with its default. A recipe changes what its paper says."""

from ml_collections import ConfigDict

from disco_jax.data.stacks import NO_LOCALS, STACKS
from disco_jax.errors import UserError, unknown

# name: source, splits, image size, what an evaluation resizes to first (0: straight to the size),
# stem of the convolutional networks.
DATA = {
    "imagenet2012": dict(eval_split="validation", size=224, eval_resize=256, stem="imagenet"),
    "fashion_mnist": dict(eval_split="test", size=28, eval_resize=0, stem="small"),
    "digits": dict(eval_split="test", size=16, eval_resize=0, stem="small"),
}
# Keys remembered where 65,536 would be more than the images there are.
SMALL_QUEUES = {"digits": 1024, "fashion_mnist": 16_384}


def parse(arg: str | None, **defaults) -> ConfigDict:
    """The part after the colon of `--config FILE:key=value,key=value`, over `defaults`.

    Raises:
      UserError: for a key that the recipe does not have or a value of another type.
    """
    values = dict(defaults)
    for pair in filter(None, (arg or "").split(",")):
        key, _, value = pair.partition("=")
        if key not in defaults:
            raise unknown("The recipe's argument", key, defaults)
        kind = type(defaults[key])
        if kind is bool:
            if value.lower() not in ("", "true", "false"):
                raise UserError(f"The recipe's argument {pair!r} must be {key}=true or false.")
            values[key] = value.lower() != "false"
            continue
        try:
            values[key] = kind(value)
        except ValueError:
            raise UserError(
                f"The recipe's argument {pair!r} must be of type {kind.__name__}."
            ) from None
    return ConfigDict(values)


def join(arg: ConfigDict, without: str) -> str:
    """`arg` as the text that another recipe's `get_config` takes, but for one key."""
    return ",".join(f"{key}={value}" for key, value in arg.items() if key != without)


def augment(config: ConfigDict, stack: str) -> None:
    """Takes another of `STACKS`; the size of the images and their handedness stay."""
    kept = ("size", "flip_prob")
    config.augment.update({k: v for k, v in STACKS[stack].items() if k not in kept})


def pretrain(data: str = "imagenet2012", smoke: bool = False) -> ConfigDict:
    """Every field of a pretraining config. The objectives all have weight 0.

    Args:
      data: a name of `DATA`, or another TFDS name (ImageNet's sizes are taken then).
      smoke: two steps with tiny numbers, to see a recipe run.
    """
    known = DATA.get(data, DATA["imagenet2012"])
    config = ConfigDict()
    config.name = ""  # of the recipe, for tables and figures
    config.seed = 0
    config.batch_size = 256  # over all devices of all hosts
    config.total_epochs = 200
    config.total_steps = 0  # 0: from total_epochs; else the run stops there
    config.dtype = "auto"  # of the computation: float32 | bfloat16 | auto (bfloat16 off the CPU)

    config.data = dict(
        source="tfds",  # tfds | folder | npz
        name=data,
        # "": $TFDS_DATA_DIR or ~/tensorflow_datasets; else a folder, a pattern of pictures'
        # names, or an .npz file
        dir="",
        train_split="train",
        eval_split=known["eval_split"],
        eval_resize=known["eval_resize"],
        shuffle_buffer=16_384,
        cache=False,  # keep the encoded records in memory; small data sets always are
        max_unreadable=100,  # images that may be skipped before the run stops
    )
    config.views = 2  # crops an image; the objectives number them from 0
    config.augment = {**STACKS["moco_v2"], "size": known["size"]}
    # Further, smaller crops, numbered after those; all else is as in augment.
    config.local = dict(NO_LOCALS)

    # Which images the teacher finds alike, made by `disco-jax bags`. sampling: images | clusters
    # (evenly over the clusters).
    config.bags = dict(file="", sampling="images")

    encoder = dict(
        backbone="resnet18",
        width=0,  # channels of the first stage; 0: the backbone's own
        stem=known["stem"],  # imagenet | small
        zero_init_residual=False,  # true: as timm's ResNets start (disagreement M4)
        grid=0,  # patches a side that a ViT's position embedding is for; 0: the backbone's own
        norm_group=0,  # images a BatchNorm group; 0: all of a device
        adapter=0,  # width of a linear layer before the head; 0: none
        head="mlp",  # mlp | mlp_bn | mlp_unit | swav | dino | dino_bn | regression | none
        hidden=2048,  # width of the head; 0: one linear layer, -1: the backbone's
        dim=128,
        prototypes=(),  # on top of the head: their number, for each set of them
    )
    # dim=0: as wide as what of the teacher it copies. reuse=("head",): the teacher's head, copied
    # and kept still, behind a learned adapter (RETRO).
    config.student = dict(encoder, norm="local", reuse=())
    config.momentum = dict(ema_rate=0.999, norm="shuffle")
    # weights: the workdir of a run or of an import, or a PyTorch checkpoint. head="auto": all but
    # the backbone's name is taken from them. mean, std: what its images are normalised by; ():
    # what the weights say, else as the student's.
    config.teacher = dict(encoder, norm="local", head="auto", weights="", mean=(), std=())

    config.objectives = dict(
        contrast=dict(
            weight=0.0,
            pairs=((0, 1),),
            keys_from="momentum",
            temperature=0.2,
            queue_size=65_536,
            queue_init="teacher",  # the teacher's queue where it has one | random (disagreement D3)
        ),
        distill=dict(
            weight=0.0,
            views=(0, 1),
            reduction="mean",
            teacher_output="embedding",  # embedding | features
            teacher_views=(),  # (): the same
        ),
        similarity=dict(
            weight=0.0,
            groups=(((0, 0),),),  # of (student view, teacher view); a queue a group
            student_temperature=0.2,
            teacher_temperature=0.01,  # 0: one-hot
            queue_size=65_536,
            queue_init="random",
        ),
        relations=dict(weight=0.0, view=0, distance=1.0, angle=1.0, group=0),
        attention=dict(weight=0.0, view=0, layers="all", resize="none"),
        compress=dict(
            weight=0.0,
            view=0,
            bank="momentum",  # momentum | student | teacher
            teacher_output="features",
            temperature=0.04,
            queue_size=128_000,
        ),
        bags=dict(
            weight=0.0,
            temperature=0.2,
            queue_size=65_536,
            queue_init="random",
            cutmix=True,
            own_epochs=11,  # of the image's own key alone
        ),
        consistency=dict(
            weight=0.0,
            query_view=0,
            key_view=1,
            student_temperature=0.1,
            target_temperature=0.04,
            queue_size=131_072,
        ),
        pseudo_labels=dict(weight=0.0, view=0),
        online_clusters=dict(weight=0.0, view=0, count=4096, temperature=0.2, rate=0.9, idle=0.01),
        binary_contrast=dict(
            weight=0.0,
            view=0,
            temperature=0.07,
            queue_size=65_536,
        ),
    )
    config.optimizer = dict(name="sgd", momentum=0.9, weight_decay=1e-4)
    config.learning_rate = dict(
        per_256=0.03,  # the peak for a global batch of 256; scaled linearly with the batch
        decay="cosine",  # cosine | steps | constant
        every="epoch",  # the rate changes once an epoch, or every step
        milestones=(),  # of "steps", in epochs
        factor=0.1,  # of "steps"
        warmup_epochs=0,
        warmup_from=0.0,  # the rate at step 0, not scaled
    )
    # Collapse: health/std below min_std (0: never) in `patience` log lines in a row.
    config.health = dict(min_std=0.01, patience=10, stop=False)
    config.log = dict(every_steps=50, tensorboard=True)
    config.checkpoint = dict(
        every_steps=1000,
        keep=3,  # newest checkpoints kept
        best_metric="loss",  # and the one with the lowest value of this metric; "": none
    )
    if data in SMALL_QUEUES:
        small_images(config, SMALL_QUEUES[data])
    if smoke:
        tiny(config)
    return config


def small_images(config: ConfigDict, queue_size: int) -> None:
    """Small sets of grey images of 16 to 28 px: batch, queue and augmentation that fit them."""
    config.batch_size = 128
    _set_queues(config, queue_size)
    config.total_epochs = 40
    config.augment.flip_prob = 0.0  # digits and shoes have a handedness
    config.log.every_steps = 20
    config.checkpoint.every_steps = 200


def tiny(config: ConfigDict) -> None:
    """Two steps with small numbers, whatever the data."""
    config.batch_size = 8
    config.total_steps = 2
    config.augment.size = 32
    config.student.update(hidden=32, dim=16)
    config.teacher.update(hidden=32, dim=16)
    config.objectives.online_clusters.count = 16
    _set_queues(config, 64)
    config.log.every_steps = 1
    config.checkpoint.every_steps = 1


def _set_queues(config: ConfigDict, size: int) -> None:
    for fields in config.objectives.values():
        if "queue_size" in fields:
            fields.queue_size = size
