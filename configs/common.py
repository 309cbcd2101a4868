"""What recipes share: every field, with its default. A recipe changes what its paper says."""

from ml_collections import ConfigDict

from disco_jax.data.stacks import NO_LOCALS, STACKS
from disco_jax.errors import UserError, unknown
from disco_jax.methods import registry

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
        name=data,  # of the data set, as TFDS has it; of others for tables and figures
        # "": $TFDS_DATA_DIR or ~/tensorflow_datasets; else a folder of pictures or .tar archives, a
        # pattern of pictures' names, a list of files, or an .npz file
        dir="",
        train_split="train",
        eval_split=known["eval_split"],
        # px of the shorter side before evaluations cut out the centre; 0: straight to the size
        eval_resize=known["eval_resize"],
        subset="",  # a list of file names, one a line: training reads these alone
        shuffle_buffer=16_384,  # encoded records held to be mixed, of TFRecord files
        cache=False,  # keep the encoded records in memory; small data sets always are
        # By hand: split=folder, as in "train=Training set,test=Holdout"; a folder, a pattern of
        # what is in data.dir, a list, or "." for all. "": by the names of folders.
        splits="",
        labels="",  # a list of files with a comma or tab and a class each, of pictures without one
        # Values of pictures with more than 8 bits a channel that become 0..255: full (all 16 bits)
        # | image (from the lowest to the highest of each) | two numbers, as in "0,4095".
        range="full",
        max_pixels=178_956_970,  # larger pictures count as unreadable
        max_unreadable=10,  # images that may be skipped before the run stops, of however few
        max_unreadable_percent=1.0,  # and the share of the images that may be, if that is more
    )
    config.views = 2  # crops an image; the objectives number them from 0
    config.augment = {**STACKS["moco_v2"], "size": known["size"]}
    # Further, smaller crops, numbered after those; all else is as in augment.
    config.local = dict(NO_LOCALS)
    # Views of one size go through a network in one pass and share batch statistics (SwAV, DINO,
    # SSLight); false: one after the other (MoCo, DisCo, SEED).
    config.group_views = False

    # Which images the teacher finds alike, made by `disco-jax bags`. sampling: images | clusters
    # (evenly over the clusters).
    config.bags = dict(file="", sampling="images")

    encoder = dict(
        backbone="resnet18",
        width=0,  # channels of the first stage; 0: the backbone's own
        stem=known["stem"],  # imagenet | small
        zero_init_residual=False,  # true: as timm's ResNets start (disagreement M4)
        grid=0,  # patches a side that a ViT's position embedding is for; 0: the backbone's own
        patch=0,  # side of a ViT's or XCiT's patches in px; 0: the backbone's own
        drop_path=0.0,  # stochastic depth of a ViT or XCiT while it learns
        norm_group=0,  # images a BatchNorm group; 0: all of a device
        adapter=0,  # width of a linear layer before the head; 0: none
        # mlp | mlp_bn | mlp_bn_all | mlp_unit | mlp_narrow | swav | swav_narrow | dino | dino_bn
        # | regression | none
        head="mlp",
        hidden=2048,  # width of the head; 0: one linear layer, -1: the backbone's
        layers=0,  # linear layers of the head; 0: its own, two and of DINO's three
        dim=128,  # of the embedding
        prototypes=(),  # on top of the head: their number, for each set of them
    )
    # dim=0: as wide as what of the teacher it copies. reuse=("head",): the teacher's head, copied
    # and kept still, behind a learned adapter (RETRO).
    config.student = dict(
        encoder,
        norm="local",
        reuse=(),
        # what it starts from, and its EMA copy with it: the workdir of a run or of an import, or a
        # PyTorch checkpoint; "": fresh weights. A run that goes on does not read them again.
        weights="",
        start="backbone",  # what is taken of them: backbone | all, with the head
        network="student",  # of a run: student | momentum
    )
    config.momentum = dict(
        ema_rate=0.999,  # the share of old weights that a step keeps
        ema_rate_end=-1.0,  # half a cosine leads there at the end of the run; -1: constant
        follow="before",  # before the momentum network encodes | after the optimizer's step
        norm="shuffle",
    )
    # weights: the workdir of a run or of an import, or a PyTorch checkpoint. head="auto": all but
    # the backbone's name is taken from them. network: of a run, student | momentum. mean, std: what
    # its images are normalised by; (): what the weights say, else as the student's.
    config.teacher = dict(
        encoder,
        norm="local",
        head="auto",
        weights="",
        network="student",
        mean=(),
        std=(),
        cache="",  # a folder of `disco-jax cache`: its outputs instead of a pass of the teacher
    )

    config.objectives = registry.sections()
    # What makes a step quicker and leaves what is learned as it is, up to rounding.
    config.fast = dict(
        losses=True,  # queues are read in one pass, in the computation's dtype; false: float32
        # queues of keys in bfloat16: half the memory; those of `similarity` stay float32
        half_queue=False,
        # queues of contrast, similarity and bags: every device keeps the keys that it made and
        # compares the queries of all devices with them, which divides a queue's memory by the
        # devices, and the time to read it
        shard_queue=False,
        # how images are traded for shuffled BatchNorm: gather (every device gets all of them) |
        # all_to_all (those that it needs; TPUs alone) | auto (all_to_all on TPUs)
        exchange="auto",
        # the first convolution takes two columns at once, and what a ResNet's max-pool leaves is
        # normalised, not what it reads; weights are stored as ever
        stem=True,
        # first layers with columns side by side in the channels, which fills a TPU's lanes: four
        # in EfficientNets and MobileNets, two in ResNets: on | off | auto (on TPUs)
        columns="auto",
        # BatchNorm of the teacher and the momentum network behind a 1x1 convolution to more
        # channels takes its statistics from what that read: on | off | auto (on TPUs)
        statistics="auto",
        # depthwise, 1x1 and late convolutions and the gradient of a ResNet's max-pool as sums and
        # products of shifted maps, in probes and `embed` too: on | off | auto (on CPUs)
        shifts="auto",
        # the teacher's kernels in the computation's dtype, and on stored statistics ("running")
        # its BatchNorm inside the layers before
        teacher=True,
    )
    config.optimizer = dict(
        name="sgd",  # sgd | larc | lars | adamw
        momentum=0.9,  # of all but adamw
        weight_decay=1e-4,
        weight_decay_end=-1.0,  # half a cosine leads there at the end of the run; -1: constant
        no_decay=(),  # kinds of parameters without weight decay: "vectors", "depthwise"
        trust=1e-3,  # of larc and lars
        no_trust=(),  # kinds without the trust ratio of lars
        clip=0.0,  # most norm of each parameter's gradient; 0: any
        # Patterns of parameters, such as "prototypes/*":
        frozen=(),  # that stand still for the first frozen_steps or frozen_epochs
        frozen_steps=0,
        frozen_epochs=0,
        fixed=(),  # that are never learned
        unit_norm=(),  # kernels whose columns have length 1 after every step
    )
    config.learning_rate = dict(
        per_256=0.03,  # the peak for a global batch of 256; scaled linearly with the batch
        # cosine (of the whole run) | cosine_after (the warm-up, down to minimum) | steps | constant
        decay="cosine",
        every="epoch",  # the rate changes once an epoch, or every step
        milestones=(),  # of "steps", in epochs
        factor=0.1,  # of "steps"
        minimum=0.0,  # of "cosine_after", not scaled
        warmup_epochs=0,  # a line from warmup_from to the peak
        warmup_from=0.0,  # the rate at step 0, not scaled
    )
    # Collapse: health/std below min_std (0: never) in `patience` log lines in a row.
    config.health = dict(min_std=0.01, patience=10, stop=False)
    config.log = dict(
        every_steps=50,
        tensorboard=True,  # of the run and its evaluations; in a bucket beside TFDS data alone
        report=True,  # the contact sheet of views at the start, report.html at the end
        replicas_every_steps=0,  # compare all replicas bit by bit so often; 0: never
        # End the process after so many seconds without a step, what is compiled, evaluated and
        # saved with it included; 0: never.
        hang_s=1800.0,
    )
    # Whether it learns: kNN of the student's features within a labelled split, each image by the
    # others, as knn/top1 in the metrics. It costs a pass over so many images each time.
    config.monitor = dict(
        knn_every_steps=0,  # 0: never
        split="",  # "": data.eval_split
        images=5000,  # drawn evenly over the classes; 0: all
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


def is_large(arg: ConfigDict) -> bool:
    """Whether a recipe's arguments ask for a run of the papers' size."""
    return not arg.smoke and arg.data not in SMALL_QUEUES


def multicrop(config: ConfigDict, arg: ConfigDict, stack: str, **local) -> None:
    """Views of two sizes, one pass a size, with the statistics of the global batch.

    Args:
      config: from `pretrain`, to be changed.
      arg: the recipe's arguments `data` and `smoke`; small images keep their handedness and get
        local views of half their size.
      stack: a name of `STACKS`, for the global views.
      local: fields of `config.local`.
    """
    size, flip = config.augment.size, config.augment.flip_prob
    config.augment = {**STACKS[stack], "size": size}
    config.local.update(local)
    config.group_views = True
    config.student.norm = config.momentum.norm = "sync"
    config.teacher.norm = "running"
    if not is_large(arg):
        config.augment.update(flip_prob=flip, blur_sigma=(0.1, 0.6))
        config.local.size = size // 2
    if arg.smoke:
        config.local.count = 2


def swapped(config: ConfigDict, arg: ConfigDict, queue_size: int, queue_epochs: int) -> None:
    """SwAV's objective, 3000 prototypes, and a queue cut to a multiple of the batch as its code's.

    Args:
      config: from `pretrain`, with the batch that it will have.
      arg: the recipe's arguments `data` and `smoke`, which make all of it smaller.
      queue_size: embeddings.
      queue_epochs: before the queue starts to fill.
    """
    config.student.prototypes = (3000 if is_large(arg) else 16 if arg.smoke else 32,)
    if not is_large(arg):
        # Digits end with assignments alike for all at 0.05: a few hundred steps do not tell them
        # apart well enough.
        config.objectives.swapped.epsilon = 0.01
    size = queue_size if is_large(arg) else 2 * config.batch_size
    config.objectives.swapped.update(
        weight=1.0,
        queue_size=size // config.batch_size * config.batch_size,
        queue_epochs=queue_epochs if is_large(arg) else 1,
    )
    config.optimizer.update(frozen=("prototypes/*",), unit_norm=("prototypes/kernel*",))


def self_distill(config: ConfigDict, arg: ConfigDict, prototypes: int) -> None:
    """DINO's objective, its head's last layer, and its momentum network.

    Args:
      config: from `pretrain`, to be changed.
      arg: the recipe's arguments `data` and `smoke`, which make all of it smaller.
      prototypes: outputs of the last layer.
    """
    config.student.prototypes = (prototypes if is_large(arg) else 16 if arg.smoke else 256,)
    if is_large(arg):
        config.student.dim = config.teacher.dim = 256
    config.objectives.self_distill.weight = 1.0
    config.momentum.update(ema_rate=0.996, ema_rate_end=1.0, follow="after")
    config.optimizer.update(frozen=("prototypes/*",), frozen_epochs=1)


def is_transformer(backbone: str) -> bool:
    """Whether DINO trains it with AdamW and a head without BatchNorm."""
    return backbone.startswith(("vit", "xcit"))


def small_patches(network: ConfigDict, arg: ConfigDict, size: int) -> None:
    """Patches of 4 px for a transformer on small images of `size` px."""
    if not is_large(arg) and is_transformer(network.backbone):
        network.update(patch=4, stem="")
        network.grid = size // 4 if network.backbone.startswith("vit") else 0


def sslight(config: ConfigDict, arg: ConfigDict, stack: str, per_256: float) -> None:
    """SSLight's view sampling and optimizers (arXiv:2210.02808, Table 8), for any of its methods.

    The axes of its section 3.3 are fields: S_g `augment.scale[0]`, S_l `local.scale[1]`, LC
    `local.size`, N_l `local.count`, and alpha `objectives.*.global_share`.

    Args:
      config: from `pretrain`, to be changed.
      arg: the recipe's arguments.
      stack: a name of `STACKS`.
      per_256: the peak rate of convolutional networks at a batch of 256.
    """
    transformer = is_transformer(arg.student)
    config.student.backbone = arg.student
    multicrop(config, arg, stack, size=128, scale=(0.05, 0.3), count=10 if transformer else 6)
    config.augment.scale = (0.3, 1.0)
    small_patches(config.student, arg, config.augment.size)
    if is_large(arg):
        config.batch_size = 1024
    config.learning_rate.update(
        per_256=per_256, decay="cosine_after", every="step", minimum=0.0048, warmup_epochs=10
    )
    # Biases and norms have neither decay nor trust ratio, depthwise kernels no decay (L2).
    config.optimizer.update(
        name="lars",
        weight_decay=1e-6,
        no_decay=("vectors", "depthwise"),
        no_trust=("vectors",),
    )
    if transformer:
        config.learning_rate.update(per_256=5e-4, minimum=1e-5)
        config.optimizer.update(
            name="adamw", weight_decay=0.04, weight_decay_end=0.4, no_decay=("vectors",)
        )
        config.student.drop_path = 0.1
    if arg.data in SMALL_QUEUES:
        config.learning_rate.update(warmup_epochs=2, minimum=0.0)
        # Less is cut away of small images.
        config.augment.scale, config.local.scale = (0.4, 1.0), (0.3, 0.7)
        config.local.count = 2


def small_images(config: ConfigDict, queue_size: int) -> None:
    """Small sets of grey images of 16 to 28 px: batch, queue and augmentation that fit them."""
    config.batch_size = 128
    _set_queues(config, queue_size)
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
    config.objectives.online_clusters.count = 16
    _set_queues(config, 64)
    config.log.every_steps = 1
    config.checkpoint.every_steps = 1


def _set_queues(config: ConfigDict, size: int) -> None:
    for fields in config.objectives.values():
        if "queue_size" in fields:
            fields.queue_size = size


def evaluation(name: str) -> ConfigDict:
    """Every field that all evaluations of a run share.

    Args:
      name: of the files with the results in the run's directory.
    """
    config = ConfigDict()
    config.name = name
    config.report = True  # write the run's report.html anew
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
        splits="",  # as of a run; of another data set, "" is by the names of folders
        labels="",  # as of a run; of another data set, "" is none
        range="",  # as of a run; of another data set, "" is full
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
    # A grid of rates and weight decays instead, trained side by side on frozen features;
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


def sweep(name: str) -> ConfigDict:
    """Every field of a sweep.

    Args:
      name: of the table.
    """
    config = ConfigDict()
    config.name = name
    config.recipe = ""  # that every cell begins with: "disco" or "disco:data=fashion_mnist"
    # ((axis, values), ...); a cell for each combination. An axis is an argument of the recipe
    # ("student"), a field ("config.student.hidden"), "recipe", or "teacher": a name of `teachers`.
    config.axes = ()
    config.further = ()  # further products of axes, whose cells stand below the first's
    config.arguments = ()  # ((argument, value), ...) of the recipe of every cell
    config.seeds = (0,)  # a cell for each; the table has means and spreads
    config.changes = ()  # ((field, value), ...) of all cells and of the teachers made here
    config.teacher = ""  # of all cells, where it is no axis
    config.teachers = {}
    config.evaluate = ("linear", "knn")  # recipes of the tasks that score each run
    config.joint = 8  # students that may train in one step, where they can share a teacher
    # Of the figure: the axis along x, those that tell lines apart, and the score. x="": bars.
    config.figure = dict(x="", score="linear")
    config.claims = {}  # name -> `claim`; what they come to stands above the table
    return config


def claim(says: str, better, worse, at_least: bool = False, most=()) -> dict:
    """An entry of a sweep's `claims`: some rows of its table score more than others.

    Rows are picked by ((axis, value), ...); of the axes that neither names, two rows that are
    compared have the same values.

    Args:
      says: the claim, as a sentence.
      better: the rows that score more.
      worse: those that score less.
      at_least: as much is enough.
      most: (axis, value): not that `better` wins, but that it wins by more there than elsewhere.
    """
    return dict(says=says, better=better, worse=worse, at_least=at_least, most=most)


def teacher(backbone: str, weights: str = "", recipe: str = "", changes=(), fields=()) -> dict:
    """An entry of a sweep's `teachers`.

    Args:
      backbone: its name.
      weights: see `config.teacher.weights`; "": the sweep trains it first.
      recipe: of that training, e.g. "moco_v2:student=resnet50".
      changes: ((field, value), ...) of that training; they win over those of the sweep.
      fields: ((field, value), ...) of the runs that it teaches.
    """
    return dict(backbone=backbone, weights=weights, recipe=recipe, changes=changes, fields=fields)


def smoke_sweep(config: ConfigDict) -> None:
    """Two steps a cell on tiny images, to see a sweep run; teachers are random."""
    if config.recipe:
        config.recipe = smoke_recipe(config.recipe)
    config.changes = (
        ("augment.size", 16),
        ("local.size", 8),
        ("student.width", 4),
        ("teacher.width", 4),
    )
    config.teachers = {name: teacher("resnet8", "random") for name in config.teachers}
    config.evaluate = (("linear", (("total_epochs", 2),)), "knn")


def smoke_recipe(recipe: str) -> str:
    """A recipe's reference with what makes its runs tiny."""
    return recipe + (",data=digits,smoke=true" if ":" in recipe else ":data=digits,smoke=true")
