r"""What each part of RETRO brings (RETRO, Table 4).

    disco-jax sweep --config sweeps/retro_ablation --workdir gs://BUCKET/retro \
        --config.teachers.resnet50.weights=gs://BUCKET/moco_v2

DisCo, with the teacher's head, and with the symmetric loss too. The paper's linear top-1 stands
beside ours in the table; ours: not measured yet.
"""

from disco_jax.configs import common
from disco_jax.configs.sweeps.hidden_width import STUDENTS

RECIPES = ("disco", "retro:symmetric=false", "retro")


def get_config(arg=None):
    arg = common.parse(arg, smoke=False)
    config = common.sweep("retro_ablation")
    config.teacher = "resnet50"
    config.teachers = dict(resnet50=common.teacher("resnet50"))
    config.axes = (("recipe", RECIPES), ("student", STUDENTS))
    if arg.smoke:
        common.smoke_sweep(config)
        recipes = tuple(map(common.smoke_recipe, RECIPES))
        config.axes = (("recipe", recipes), ("student", ("resnet8",)))
    return config
