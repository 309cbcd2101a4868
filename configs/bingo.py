r"""BINGO on ImageNet-1k: images of a bag, which the teacher made, belong together.

    disco-jax bags --workdir gs://BUCKET/bags --config.teacher=gs://BUCKET/moco_v2
    disco-jax pretrain --workdir gs://BUCKET/bingo \
        --config configs/bingo.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2 --config.bags.file=gs://BUCKET/bags/bags.npz

arXiv:2107.01691. Linear top-1, R-50 -> R-18: 61.4 (RETRO, Table 6); ours not measured yet.

The student has no momentum copy; the keys are the teacher's, its BatchNorm on shuffled batch
statistics as in the code. EfficientNets: temperature 0.12, weight decay 4e-5. The bags are the 5
nearest neighbours, or K-means clusters with `disco-jax bags --config.kind=kmeans`.
"""

from disco_jax.configs import common


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", smoke=False
    )
    config = common.pretrain(arg.data, arg.smoke)
    config.name = "bingo"
    config.views = 4  # two of the image, two of another of its bag
    config.student.backbone = arg.student
    config.teacher.update(backbone=arg.teacher, norm="shuffle")
    config.objectives.bags.weight = 1.0
    if arg.student.startswith("efficientnet"):
        config.objectives.bags.temperature = 0.12
        config.optimizer.weight_decay = 4e-5
    if arg.data in common.SMALL_QUEUES:
        config.objectives.bags.own_epochs = 2
    if arg.smoke:
        config.teacher.weights = "random"
    return config
