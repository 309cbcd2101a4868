r"""CompRess on ImageNet-1k: similarities to anchor points copy the teacher's (arXiv:2010.14713).

    disco-jax pretrain --workdir gs://BUCKET/compress \
        --config configs/compress.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

Linear top-1, R-50 -> R-18: not among the tables at hand; ours not measured yet. `queues=2` holds
the features of the momentum student beside the teacher's; `queues=1` compares both networks with
the teacher's and has a linear layer on the student. One weak view for all networks.
"""

from disco_jax.configs import common


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", queues=2, smoke=False
    )
    if arg.queues not in (1, 2):
        raise common.unknown("The recipe's argument queues", arg.queues, (1, 2))
    config = common.pretrain(arg.data, arg.smoke)
    config.name = f"compress_{arg.queues}q"
    config.views = 1
    common.augment(config, "weak")
    config.student.backbone = arg.student
    config.teacher.update(backbone=arg.teacher, norm="running")
    config.momentum.norm = "local"
    config.objectives.compress.weight = 1.0
    if arg.queues == 2:
        config.student.head = "none"
    else:
        config.student.update(hidden=0, dim=0)
        config.objectives.compress.bank = "teacher"
    config.learning_rate.update(per_256=0.01, decay="steps", factor=0.2)
    if arg.data not in common.SMALL_QUEUES:
        config.total_epochs = 130
    config.learning_rate.milestones = tuple(round(config.total_epochs * x / 13) for x in (9, 12))
    if arg.smoke:
        config.teacher.weights = "random"
    return config
