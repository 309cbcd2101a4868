r"""MoCo-v2 with relational distillation (RKD, arXiv:1904.05068), as DisCo compares with it.

    disco-jax pretrain --workdir gs://BUCKET/rkd \
        --config configs/rkd.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

Linear top-1, R-50 -> R-18: DisCo's Table 2 56.4; ours not measured yet. `rkd:disco=true` adds
DisCo's distance: 60.6.

Distances and angles weigh 1 and 1 among the 32 images of a device, as DisCo's code has it; RKD's
paper has 1 and 2 (disagreement A2).
"""

from disco_jax.configs import common, disco


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", disco=False, smoke=False
    )
    config = disco.get_config(common.join(arg, without="disco"))
    config.name = "disco_rkd" if arg.disco else "rkd"
    config.objectives.relations.weight = 1.0
    if arg.data not in common.SMALL_QUEUES and not arg.smoke:
        config.objectives.relations.group = 32
    if not arg.disco:
        config.objectives.distill.weight = 0.0
    return config
