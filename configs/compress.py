r"""CompRess on ImageNet-1k: similarities to anchor points copy the teacher's (arXiv:2010.14713).

    disco-jax pretrain --workdir gs://BUCKET/compress \
        --config configs/compress.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

Linear top-1, R-50 -> R-18: the paper's value is not available to us; ours not measured yet.
`queues=2` compares the student with features of its EMA copy and the teacher with its own;
`queues=1` compares both with the teacher's features and puts a linear layer on the student.
"""

from disco_jax.configs import common, small
from disco_jax.errors import unknown


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", queues=2, smoke=False
    )
    if arg.queues not in (1, 2):
        raise unknown("The recipe's argument queues", arg.queues, (1, 2))
    config = common.pretrain(f"compress_{arg.queues}q", arg.data)
    # Official code (train_student.py).
    config.total_epochs, config.batch_size = 130, 256
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=1e-4)
    config.learning_rate.update(base_lr=0.01, decay="steps", milestones=(90, 120), factor=0.2)
    # One weak view for all networks.
    config.views = 1
    common.augment(config, "weak")
    # The student's features with two queues; a linear layer as wide as the teacher's with one.
    if arg.queues == 2:
        config.student.update(backbone=arg.student, head="none", norm="local")
    else:
        config.student.update(backbone=arg.student, head="mlp", hidden=0, dim=0, norm="local")
    config.momentum.update(ema_rate=0.999, norm="local")
    config.teacher.update(backbone=arg.teacher, norm="running")
    # Eq. 1 and 2; temperature and 128,000 anchors of the official code.
    config.objectives.compress.update(weight=1.0, view=0, teacher_output="features")
    config.objectives.compress.update(temperature=0.04, queue_size=128_000)
    config.objectives.compress.bank = "momentum" if arg.queues == 2 else "teacher"
    return small.shrink(config, arg)
