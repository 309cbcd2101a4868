r"""MoCo-v2 on ImageNet-1k (arXiv:2003.04297): a teacher, or the baseline of a lightweight student.

    disco-jax pretrain --workdir gs://BUCKET/moco_v2 \
        --config configs/moco_v2.py:student=resnet50

Linear top-1: ResNet-50 67.4, ResNet-18 52.2, ResNet-34 56.8 (DisCo, Table 1, with the linear
rate 30); ours not measured yet.
"""

from disco_jax.configs import common


def get_config(arg=None):
    arg = common.parse(arg, student="resnet50", data="imagenet2012", smoke=False)
    config = common.pretrain(arg.data, arg.smoke)
    config.name = "moco_v2"
    # The head is as wide as the features (disagreement M1).
    config.student.update(backbone=arg.student, hidden=-1)
    config.objectives.contrast.weight = 1.0
    return config
