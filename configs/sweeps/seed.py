r"""SEED's own ablations (arXiv:2101.04731): teacher temperature, queue length, what to predict.

    disco-jax sweep --config sweeps/seed:axis=temperature --workdir gs://BUCKET/seed_temperature \
        --config.teachers.resnet50.weights=gs://BUCKET/moco_v2

`axis` is temperature (0 is one-hot), queue, views (the strategies of Figure 6) or strategy (targets
other than SEED's; linear top-1 in the paper: K-means 51.0, online clustering 56.4, SEED 57.9).
K-means needs `bags=FILE`, the labels that `disco-jax bags` made. The teacher of queue and views is
SwAV's ResNet-50 (appendix A.2, A.8), with small patches for the queue:

    disco-jax sweep --config sweeps/seed:axis=queue --workdir gs://BUCKET/seed_queue \
        --config.teachers.resnet50.weights=swav_800ep_pretrain.pth.tar

The paper's best temperature is 0.01; a queue of 65,536 is 1.5 points better than one of 256. Ours:
not measured yet.
"""

from disco_jax.configs import common, small
from disco_jax.configs.sweeps import common as sweeps
from disco_jax.errors import unknown

AXES = {
    "temperature": (
        "config.objectives.similarity.teacher_temperature",
        (0.0, 1e-3, 1e-2, 3e-2, 0.1, 0.2),
    ),
    "queue": (
        "config.objectives.similarity.queue_size",
        (256, 512, 1024, 4096, 8192, 16_384, 65_536),
    ),
    "views": ("views", ("identical", "cross", "to_large", "small_patch")),
    "strategy": ("recipe", ("squared_distance", "online_clusters", "binary_contrast", "seed")),
}
SMALL = {
    "temperature": (0.0, 1e-2),
    "queue": (32, 64),
    "views": ("identical", "cross"),
    "strategy": ("squared_distance", "seed"),
}


def get_config(arg=None):
    arg = common.parse(arg, axis="temperature", student="resnet18", bags="", smoke=False)
    if arg.axis not in AXES:
        raise unknown("The recipe's argument axis", arg.axis, AXES)
    name, values = AXES[arg.axis]
    config = sweeps.sweep(f"seed_{arg.axis}")
    config.recipe = f"seed:student={arg.student}"
    if arg.axis in ("queue", "views"):
        config.recipe += ",teacher_method=swav"
    if arg.axis == "queue":
        config.recipe += ",views=small_patch,weight_decay=1e-6"
    config.teacher = "resnet50"
    config.teachers = dict(resnet50=sweeps.teacher("resnet50"))
    if name == "recipe":
        values = tuple(f"{value}:student={arg.student}" for value in values)
    if arg.smoke:
        config.recipe = "seed"
        small.sweep(config)
        values = SMALL[arg.axis]
        if name == "recipe":
            values = tuple(map(small.recipe, values))
    config.axes = ((name, values),)
    if arg.bags and arg.axis == "strategy":
        labels = f"pseudo_labels:student={arg.student}"
        labels = small.recipe("pseudo_labels") if arg.smoke else labels
        config.further = ((("recipe", (labels,)), ("config.bags.file", (arg.bags,))),)
    config.figure.x = name if arg.axis in ("temperature", "queue") else ""
    return config
