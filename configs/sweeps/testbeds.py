r"""DisCo on SwAV instead of MoCo-v2 (arXiv:2104.09124, Table 5).

    disco-jax sweep --config sweeps/testbeds --workdir gs://BUCKET/table5 \
        --config.teachers.swav.weights=swav_800ep_pretrain.pth.tar

    disco-jax sweep --config sweeps/testbeds:bed=dino --workdir gs://BUCKET/dino_testbed \
        --config.teachers.dino.weights=dino_deitsmall16_pretrain_full_checkpoint.pth

    disco-jax sweep --config sweeps/testbeds:bed=xcit --workdir gs://BUCKET/xcit_testbed \
        --config.teachers.xcit.weights=dino_xcit_small_12_p16_pretrain_full_checkpoint.pth

The table shows the paper's linear top-1 beside ours; ours: not measured yet.
"""

from disco_jax.configs import common, small
from disco_jax.configs.sweeps import common as sweeps
from disco_jax.errors import unknown

# Testbed -> recipe, students, backbone of the teacher.
BEDS = {
    "swav": ("swav", ("efficientnet_b0", "mobilenetv3_large", "resnet34"), "resnet50"),
    "dino": ("dino", ("vit_tiny_p16",), "vit_small_p16"),
    "xcit": ("dino", ("xcit_tiny_12_p16",), "xcit_small_12_p16"),
}


def get_config(arg=None):
    arg = common.parse(arg, bed="swav", smoke=False)
    if arg.bed not in BEDS:
        raise unknown("The recipe's argument bed", arg.bed, BEDS)
    recipe, students, teacher = BEDS[arg.bed]
    config = sweeps.sweep(f"testbeds_{arg.bed}")
    config.teacher = arg.bed
    config.teachers = {arg.bed: sweeps.teacher(teacher)}
    recipes = (recipe, f"{recipe}_disco")
    config.axes = (("recipe", recipes), ("student", students))
    if arg.smoke:
        small.sweep(config)
        recipes = tuple(map(small.recipe, recipes))
        config.axes = (("recipe", recipes), ("student", ("resnet8",)))
    return config
