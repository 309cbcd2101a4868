r"""SSLight's axes of view sampling, one at a time (arXiv:2210.02808, Figures 1 to 3).

    disco-jax sweep --config sweeps/sslight:axis=scale --workdir gs://BUCKET/sslight_scale

`axis` is scale (smallest share of the image in a global crop, S_g), local_scale (largest share in a
local crop, S_l), local_size (LC), count (N_l) or share (alpha of eq. 3). As in the paper, each axis
varies around the setting of its figure: S_g around DINO's other views, S_l with S_g = 0.3, LC and
N_l with S_g = S_l = `smallest` (0.3, or 0.14) and the default alpha, alpha around SSLight's views.
`recipe` is sslight_moco, sslight_swav or sslight_dino. The paper scores these runs on 50 images of
each class that it holds out of training; here they are scored on the validation images. Ours: not
measured yet.
"""

from disco_jax.configs import common, small
from disco_jax.configs.papers.sslight import OBJECTIVES
from disco_jax.configs.sweeps import common as sweeps
from disco_jax.errors import unknown

AXES = {
    "scale": ("config.augment.scale", ((0.14, 1.0), (0.2, 1.0), (0.3, 1.0), (0.4, 1.0))),
    "local_scale": ("config.local.scale", ((0.05, 0.14), (0.05, 0.2), (0.05, 0.3), (0.05, 0.4))),
    "local_size": ("config.local.size", (96, 103, 128, 160)),
    "count": ("config.local.count", (2, 4, 6, 8, 10)),
    "share": ("config.objectives.self_distill.global_share", (-1.0, 0.2, 0.3, 0.4, 0.6)),
}


def get_config(arg=None):
    arg = common.parse(
        arg,
        axis="scale",
        recipe="sslight_dino",
        student="mobilenetv2",
        smallest=0.3,
        smoke=False,
    )
    if arg.axis not in AXES:
        raise unknown("The recipe's argument axis", arg.axis, AXES)
    if arg.recipe not in OBJECTIVES:
        raise unknown("The recipe's argument recipe", arg.recipe, OBJECTIVES)
    name, values = AXES[arg.axis]
    name = name.replace("self_distill", OBJECTIVES[arg.recipe])
    config = sweeps.sweep(f"{arg.recipe}_{arg.axis}")
    config.recipe = f"{arg.recipe}:student={arg.student}"
    config.changes = base(arg.axis, arg.recipe, arg.smallest)
    if arg.smoke:
        config.recipe = f"{arg.recipe}:student=resnet8"
        small.sweep(config)
        values = (8, 12) if arg.axis == "local_size" else values[:2]
    config.axes = ((name, values),)
    config.figure.x = name
    return config


def base(axis, recipe, smallest):
    """Returns the fields that the figure of an axis fixes."""
    share = (f"objectives.{OBJECTIVES[recipe]}.global_share", -1.0)
    crops = (("augment.scale", (smallest, 1.0)), ("local.scale", (0.05, smallest)))
    return {
        "scale": (("local.scale", (0.05, 0.14)), ("local.size", 96), share),  # Figure 1, left
        "local_scale": (("augment.scale", (0.3, 1.0)), ("local.size", 96), share),  # right
        "local_size": (*crops, share),  # Figure 2
        "count": (*crops, share),  # Figure 3, left
        "share": (),  # Figure 3, right
    }[axis]
