r"""Claims of the papers in miniature: Fashion-MNIST, light students, eight seeds.

    disco-jax sweep --config miniature/claims --workdir runs/claims
    disco-jax sweep --config miniature/claims:data=fashion_photos.npz --workdir runs/claims_photos

Runs on one accelerator; `miniature/claims:cut=cpu` is a smaller version, at 20 px, for two CPU
cores. `data=FILE.npz` reads the images from a file, without TensorFlow: a copy of Fashion-MNIST,
which `disco-jax data fashion_mnist --npz FILE.npz` makes, or its variant in colour from
`fashion_photos.py` beside this file, with the same settings. Runs have the seeds 0 to `seeds` - 1.
docs/claims.md has the measured tables.

Students are ResNet-8s of width 4 and 8 (16 and 32 features). The good teacher has width 16 and a
long training; the poor one has the size and the training of the narrow student. Views, batch,
steps, learning rate and queue are the same for all methods. Heads are as in the papers: as wide as
the features for MoCo-v2 and SEED, as wide as the teachers' for DisCo, the good teacher's own for
RETRO. DisCo also runs with the narrow head.
"""

import pathlib

from disco_jax.configs import common, small
from disco_jax.configs.sweeps import common as sweeps
from disco_jax.errors import UserError, unknown

WIDTH, HIDDEN, TEACHER = "config.student.width", "config.student.hidden", "teacher"
NARROW, WIDER, LARGE = 4, 8, 16
HEAD = 512
PROBE = (
    ("grid.rates", (0.3, 3.0)),
    ("grid.weight_decays", (0.0,)),
    ("total_epochs", 10),
    ("report", False),
)
# Epochs of the good teacher (`good`) and of all other runs, image size in px, batch, queue.
CUTS = {
    "accelerator": dict(good=60, epochs=20, size=28, batch_size=256, queue_size=16_384),
    "cpu": dict(good=4, epochs=1, size=20, batch_size=128, queue_size=4096),
}


def get_config(arg=None):
    arg = common.parse(arg, data="", cut="accelerator", seeds=8, smoke=False)
    if arg.cut not in CUTS:
        raise unknown("The recipe's argument cut", arg.cut, CUTS)
    if arg.seeds < 1:
        raise UserError(f"The recipe's argument seeds={arg.seeds} must be 1 or more.")
    cut, dataset = CUTS[arg.cut], pathlib.Path(arg.data or "fashion_mnist").stem
    config = sweeps.sweep(f"claims_{arg.cut}_{dataset}")
    config.arguments = (("data", "fashion_mnist"), ("student", "resnet8"))
    config.changes = _changes(**cut)
    config.teachers = {
        name: sweeps.teacher(
            "resnet8",
            recipe="moco_v2:student=resnet8,data=fashion_mnist",
            changes=(
                ("student.width", width),
                ("student.hidden", HEAD),
                ("total_epochs", epochs),
            ),
            fields=(("teacher.width", width),),
        )
        for name, width, epochs in (("good", LARGE, cut["good"]), ("poor", NARROW, cut["epochs"]))
    }
    students = (WIDTH, (NARROW, WIDER))
    config.axes = (("recipe", ("moco_v2",)), (WIDTH, (NARROW, WIDER, LARGE)))
    config.further = (
        (("recipe", ("disco",)), students, (HIDDEN, (-1, HEAD)), (TEACHER, ("good",))),
        (("recipe", ("retro",)), students, (TEACHER, ("good",))),
        (("recipe", ("seed",)), students, (TEACHER, ("good",))),
        (("recipe", ("disco",)), students, (HIDDEN, (HEAD,)), (TEACHER, ("poor",))),
    )
    config.seeds = tuple(range(arg.seeds))
    config.claims = _claims()
    config.evaluate = (("linear:protocol=grid", PROBE),)
    config.figure.score = "linear_grid"
    if arg.smoke:
        small.sweep(config)
        config.arguments = (("data", "digits"), ("student", "resnet8"), ("smoke", "true"))
        config.evaluate = ("knn",)
        config.figure.score = "knn"
    if arg.data:
        config.changes += (("data.source", "npz"), ("data.dir", arg.data), ("data.name", dataset))
    return config


def _changes(good, epochs, size, batch_size, queue_size):
    """Returns the fields that all runs change, for small images and few steps."""
    del good
    return (
        ("total_epochs", epochs),
        ("batch_size", batch_size),
        ("objectives.contrast.queue_size", queue_size),
        ("objectives.similarity.queue_size", queue_size),
        ("learning_rate.base_lr", 0.12),
        ("learning_rate.every", "step"),
        ("learning_rate.warmup_epochs", 0),
        ("momentum.ema_rate", 0.99),
        ("augment.size", size),
        ("augment.scale", (0.4, 1.0)),
        ("augment.blur_sigma", (0.1, 0.6)),
    )


def _claims():
    """Returns the sweep's `claims`."""
    moco, seed, retro = ((("recipe", name),) for name in ("moco_v2", "seed", "retro"))
    default, wide = ((("recipe", "disco"), (HIDDEN, hidden)) for hidden in (-1, HEAD))
    disco = (*wide, (TEACHER, "good"))
    return dict(
        degrades=sweeps.claim(
            "MoCo-v2 degrades on light students", (*moco, (WIDTH, LARGE)), (*moco,)
        ),
        over_moco=sweeps.claim("DisCo beats MoCo-v2", disco, moco),
        over_moco_alike=sweeps.claim(
            "DisCo with MoCo-v2's narrow head beats MoCo-v2", default, moco
        ),
        over_seed=sweeps.claim("DisCo beats SEED", disco, seed),
        wide=sweeps.claim("A wider head helps", disco, default),
        wide_narrow=sweeps.claim(
            "A wider head helps the narrow student most", disco, default, most=(WIDTH, NARROW)
        ),
        retro=sweeps.claim("RETRO is at least as good as DisCo", retro, disco, at_least=True),
        teacher=sweeps.claim(
            "A better teacher gives a better student", disco, (*wide, (TEACHER, "poor"))
        ),
    )
