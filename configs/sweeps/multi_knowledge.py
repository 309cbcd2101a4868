r"""Other knowledge to distil from a teacher (DisCo, arXiv:2104.09124, Table 2).

    disco-jax sweep --config sweeps/multi_knowledge --workdir gs://BUCKET/table2 \
        --config.teachers.resnet50.weights=gs://BUCKET/moco_v2

MoCo-v2 alone, attention transfer (AT), relations (RKD), DisCo, and DisCo with either; the table
shows the paper's linear top-1 beside ours. Ours: not measured yet. The paper's KD trains the
classifier afterwards: `disco-jax finetune --config configs/finetune.py:protocol=kd`.
"""

from disco_jax.configs import common, small
from disco_jax.configs.sweeps import common as sweeps
from disco_jax.configs.sweeps.hidden_width import STUDENTS

RECIPES = ("moco_v2", "attention", "rkd", "disco", "attention:disco=true", "rkd:disco=true")


def get_config(arg=None):
    arg = common.parse(arg, smoke=False)
    config = sweeps.sweep("multi_knowledge")
    config.teacher = "resnet50"
    config.teachers = dict(resnet50=sweeps.teacher("resnet50"))
    config.axes = (("recipe", RECIPES), ("student", STUDENTS))
    if arg.smoke:
        small.sweep(config)
        recipes = tuple(map(small.recipe, ("moco_v2", "rkd", "rkd:disco=true")))
        config.axes = (("recipe", recipes), ("student", ("resnet8",)))
    return config
