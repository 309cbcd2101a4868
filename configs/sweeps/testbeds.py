r"""DisCo on SwAV instead of MoCo-v2 (arXiv:2104.09124, Table 5).

    disco-jax sweep --config sweeps/testbeds --workdir gs://BUCKET/table5 \
        --config.teachers.swav.weights=swav_800ep_pretrain.pth.tar

    disco-jax sweep --config sweeps/testbeds:bed=dino --workdir gs://BUCKET/dino_testbed \
        --config.teachers.dino.weights=dino_deitsmall16_pretrain_full_checkpoint.pth

The paper's linear top-1 stands beside ours in the table; ours: not measured yet.
"""

from disco_jax.configs import common
from disco_jax.errors import unknown

# Name of the bed, its students, the teacher's backbone.
BEDS = {
    "swav": (("efficientnet_b0", "mobilenetv3_large", "resnet34"), "resnet50"),
    "dino": (("vit_tiny_p16",), "vit_small_p16"),
}


def get_config(arg=None):
    arg = common.parse(arg, bed="swav", smoke=False)
    if arg.bed not in BEDS:
        raise unknown("The recipe's argument bed", arg.bed, BEDS)
    students, teacher = BEDS[arg.bed]
    config = common.sweep(f"testbeds_{arg.bed}")
    config.teacher = arg.bed
    config.teachers = {arg.bed: common.teacher(teacher)}
    recipes = (arg.bed, f"{arg.bed}_disco")
    config.axes = (("recipe", recipes), ("student", students))
    if arg.smoke:
        common.smoke_sweep(config)
        recipes = tuple(map(common.smoke_recipe, recipes))
        config.axes = (("recipe", recipes), ("student", ("resnet8",)))
    return config
