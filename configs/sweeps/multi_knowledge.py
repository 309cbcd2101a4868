r"""What else to copy of a teacher (DisCo, arXiv:2104.09124, Table 2).

    disco-jax sweep --config sweeps/multi_knowledge --workdir gs://BUCKET/table2 \
        --config.teachers.resnet50.weights=gs://BUCKET/moco_v2

MoCo-v2 alone, attention transfer (AT), relations (RKD), DisCo, and DisCo with either; the paper's
linear top-1 stands beside ours in the table. Ours: not measured yet. The paper's KD acts while a
student is fine-tuned: `disco-jax finetune --config configs/finetune.py:kd=RUN/NAME`.
"""

from disco_jax.configs import common
from disco_jax.configs.sweeps.hidden_width import STUDENTS

RECIPES = ("moco_v2", "attention", "rkd", "disco", "attention:disco=true", "rkd:disco=true")


def get_config(arg=None):
    arg = common.parse(arg, smoke=False)
    config = common.sweep("multi_knowledge")
    config.teacher = "resnet50"
    config.teachers = dict(resnet50=common.teacher("resnet50"))
    config.axes = (("recipe", RECIPES), ("student", STUDENTS))
    if arg.smoke:
        common.smoke_sweep(config)
        recipes = tuple(map(common.smoke_recipe, ("moco_v2", "rkd", "rkd:disco=true")))
        config.axes = (("recipe", recipes), ("student", ("resnet8",)))
    return config
