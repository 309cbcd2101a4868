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
        subset="",  # a list of file names, one a line: training reads these alone
        shuffle_buffer=16_384,  # encoded records held to be mixed, of TFRecord files
        cache=False,  # keep the encoded records in memory; small data sets always are
        max_unreadable=100,  # images that may be skipped before the run stops
    )
    config.views = 2  # crops an image; the objectives number them from 0
    config.augment = {**STACKS["moco_v2"], "size": known["size"]}
    # Further, smaller crops, numbered after those; all else is as in augment.
    config.local = dict(NO_LOCALS)

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
    config.student = dict(encoder, norm="local")
    config.momentum = dict(ema_rate=0.999, norm="shuffle")
    # weights: the workdir of a run or of an import, or a PyTorch checkpoint. head="auto": all but
    # the backbone's name is taken from them.
    config.teacher = dict(encoder, norm="local", head="auto", weights="")

    config.objectives = dict(
        contrast=dict(
            weight=0.0,
            pairs=((0, 1),),
            keys_from="momentum",
            temperature=0.2,
            queue_size=65_536,
            queue_init="teacher",  # the teacher's queue where it has one | random (disagreement D3)
        ),
        distill=dict(weight=0.0, views=(0, 1), reduction="mean"),
        similarity=dict(
            weight=0.0,
            view=0,
            student_temperature=0.2,
            teacher_temperature=0.01,
            queue_size=65_536,
            queue_init="random",
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
    config.log = dict(every_steps=50, tensorboard=True)
    # Whether it learns: kNN of the student's features within a labelled split, each image by the
    # others, as knn/top1 in the metrics. It costs a pass over so many images each time.
    config.monitor = dict(
        knn_every_steps=0,  # 0: never
        split="",  # "": data.eval_split
        images=5000,  # no more than so many; 0: all
        k=20,
    )
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
    for objective in ("contrast", "similarity"):
        config.objectives[objective].queue_size = queue_size
    config.total_epochs = 40
    config.augment.antialias = "exact"  # costs nothing here
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
    for objective in ("contrast", "similarity"):
        config.objectives[objective].queue_size = 64
    config.log.every_steps = 1
    config.checkpoint.every_steps = 1


def evaluation(name: str) -> ConfigDict:
    """Every field that all evaluations of a run share.

    Args:
      name: of the files with the results in the run's directory.
    """
    config = ConfigDict()
    config.name = name
    config.network = "student"  # student | momentum
    config.output = "features"  # features | embedding | hidden: what the head's last layer reads
    config.blocks = 1  # of a ViT: class tokens of so many last blocks side by side
    config.batch_size = 256
    # "", 0 and -1: as the run has it. Another data set: name (TFDS), or dir (folder or .npz).
    config.data = dict(
        source="",  # tfds | folder | npz
        name="",
        dir="",
        train_split="",
        eval_split="",
        subset="",  # a list of file names, one a line: training reads these alone
        size=0,  # px
        eval_resize=-1,  # px of the shorter side before the centre is cut out; 0: squeeze
        interpolation="",  # bilinear | bicubic
    )
    return config


def classification(name: str) -> ConfigDict:
    """Every field of a training with labels: linear probes and fine-tuning.

    Args:
      name: see `evaluation`.
    """
    config = evaluation(name)
    config.student = ""  # the backbone that the settings are for; "": any
    config.seed = 0
    config.total_epochs = 100
    config.layers = "classifier"  # classifier | all
    config.norm = "running"  # BatchNorm of the network: running | sync | local
    config.augment = "linear"  # linear: random crops and flips | flip | none
    config.normalise = False  # rows of length 1, then every dimension by its mean and deviation
    config.init = "normal"  # normal: N(0, 0.01), bias 0 | torch: U(+-1/sqrt(fan_in))
    # A class-balanced part of the training split: percent or images a class; 0: all of it.
    config.labelled = dict(percent=0.0, per_class=0, seed=0)
    config.optimizer = dict(name="sgd", momentum=0.9, weight_decay=0.0, nesterov=False)
    config.head_rate = 1.0  # learning rate of the classifier over that of the network
    config.learning_rate = dict(
        per_256=30.0,
        decay="steps",
        every="epoch",
        milestones=(60, 80),
        factor=0.1,
        minimum=0.0,  # where "cosine_after" ends
        warmup_epochs=0,
        warmup_from=0.0,
    )
    # A grid of rates and weight decays instead, trained side by side on features extracted once;
    # the best on a held-out part of the training images is the one that is tested.
    config.grid = dict(rates=(), weight_decays=(), held_out_percent=10.0)
    # A teacher's classes beside the labels: weight is its share, teacher RUN/NAME of a probe or of
    # a fine-tuning.
    config.distill = dict(weight=0.0, teacher="", temperature=2.0, reduction="element")
    config.log_every_epochs = 10
    config.evaluate_every_epochs = 0  # on the test images; 0: once, at the end
    config.checkpoint_every_epochs = 1  # of trainings that read images
    config.extract_batch_size = 256  # images encoded at once by a host
    return config
