r"""Ablation of RETRO's parts (RETRO, Table 4).

    disco-jax sweep --config sweeps/retro_ablation --workdir gs://BUCKET/retro \
        --config.teachers.resnet50.weights=gs://BUCKET/moco_v2

Rows: DisCo; with the teacher's head; also with the symmetric loss. The table shows the paper's
linear top-1 beside ours; ours: not measured yet.
"""

from disco_jax.configs import common, small
from disco_jax.configs.sweeps import common as sweeps
from disco_jax.configs.sweeps.hidden_width import STUDENTS

RECIPES = ("disco", "retro:symmetric=false", "retro")


def get_config(arg=None):
    arg = common.parse(arg, smoke=False)
    config = sweeps.sweep("retro_ablation")
    config.teacher = "resnet50"
    config.teachers = dict(resnet50=sweeps.teacher("resnet50"))
    config.axes = (("recipe", RECIPES), ("student", STUDENTS))
    if arg.smoke:
        small.sweep(config)
        recipes = tuple(map(small.recipe, RECIPES))
        config.axes = (("recipe", recipes), ("student", ("resnet8",)))
    return config
