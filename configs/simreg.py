r"""SimReg on ImageNet-1k: regress the teacher's features through an MLP (arXiv:2201.05131).

    disco-jax pretrain --workdir gs://BUCKET/simreg \
        --config configs/simreg.py:student=mobilenetv2,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

1-NN / linear top-1, MoCo-v2 R-50: MobileNetV2 55.5 / 69.1, R-18 54.8 / 65.1 (official README);
ours not measured yet. One weak view for both networks; `views=2`,
`objectives.distill.teacher_views=(1,)` gives each its own.
"""

from disco_jax.configs import common


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", smoke=False
    )
    config = common.pretrain(arg.data, arg.smoke)
    config.name = "simreg"
    config.views = 1
    common.augment(config, "weak02")
    # As wide as the teacher's features; thrown away afterwards.
    config.student.update(backbone=arg.student, head="regression", dim=0)
    config.teacher.update(backbone=arg.teacher, norm="running")
    config.objectives.distill.update(weight=1.0, views=(0,), teacher_output="features")
    config.learning_rate.per_256 = 0.05
    if arg.data not in common.SMALL_QUEUES:
        config.total_epochs = 130
    if arg.smoke:
        config.teacher.weights = "random"
    return config
