r"""SSLight's axes of view sampling, one at a time (arXiv:2210.02808, Tables 1 and 2).

    disco-jax sweep --config sweeps/sslight:axis=scale --workdir gs://BUCKET/sslight_scale

`axis`: scale (the lower end of the global crops' share of the image, S_g), local_scale (the upper
end of the local ones', S_l), local_size (LC), count (N_l) or share (alpha of eq. 3); the rest is
that of `recipe`: sslight_moco, sslight_swav or sslight_dino. Ours: not measured yet.
"""

from disco_jax.configs import common
from disco_jax.errors import unknown

AXES = {
    "scale": ("config.augment.scale", ((0.14, 1.0), (0.2, 1.0), (0.3, 1.0), (0.4, 1.0))),
    "local_scale": ("config.local.scale", ((0.05, 0.14), (0.05, 0.2), (0.05, 0.3), (0.05, 0.4))),
    "local_size": ("config.local.size", (96, 128, 160)),
    "count": ("config.local.count", (2, 4, 6, 8, 10)),
    "share": ("config.objectives.self_distill.global_share", (-1.0, 0.2, 0.4, 0.6)),
}
OBJECTIVES = {
    "sslight_moco": "contrast",
    "sslight_swav": "swapped",
    "sslight_dino": "self_distill",
}


def get_config(arg=None):
    arg = common.parse(arg, axis="scale", recipe="sslight_dino", student="mobilenetv2", smoke=False)
    if arg.axis not in AXES:
        raise unknown("The recipe's argument axis", arg.axis, AXES)
    if arg.recipe not in OBJECTIVES:
        raise unknown("The recipe's argument recipe", arg.recipe, OBJECTIVES)
    name, values = AXES[arg.axis]
    name = name.replace("self_distill", OBJECTIVES[arg.recipe])
    config = common.sweep(f"{arg.recipe}_{arg.axis}")
    config.recipe = f"{arg.recipe}:student={arg.student}"
    if arg.smoke:
        config.recipe = f"{arg.recipe}:student=resnet8"
        common.smoke_sweep(config)
        values = (8, 12) if arg.axis == "local_size" else values[:2]
    config.axes = ((name, values),)
    config.figure.x = name
    return config
