r"""DisCo on ImageNet-1k: a MoCo-v2 ResNet teaches a lightweight student (arXiv:2104.09124).

    disco-jax pretrain --workdir gs://BUCKET/disco \
        --config configs/disco.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

Linear top-1, R-50 -> R-18: paper 60.6 (Table 1); ours not measured yet.

Where the paper and the official code differ, the code's setting is taken and the paper's is an
option: the weight of the distillation (`objectives.distill.weight=1.0`), the teacher's BatchNorm
(`teacher.norm=running`), the queue's start (`objectives.contrast.queue_init=random`).
"""

from disco_jax.configs import common


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", smoke=False
    )
    config = common.pretrain(arg.data, arg.smoke)
    config.name = "disco"
    config.student.backbone = arg.student
    # A MoCo-v2 teacher, on batch statistics (disagreement D2).
    config.teacher.update(backbone=arg.teacher, hidden=-1, norm="local")
    config.objectives.contrast.weight = 1.0
    config.objectives.distill.weight = 32.0  # on the mean of the batch (disagreement D1)
    if arg.smoke:
        config.teacher.weights = "random"
    return config
