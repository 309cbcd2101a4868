r"""DisCo on SwAV, ImageNet-1k: a SwAV ResNet-50 teaches a lightweight student (arXiv:2104.09124).

    disco-jax pretrain --workdir gs://BUCKET/swav_disco \
        --config configs/swav_disco.py:student=efficientnet_b0,teacher=resnet50 \
        --config.teacher.weights=swav_800ep_pretrain.pth.tar

Linear top-1 (Table 5): EfficientNet-B0 62.4, MobileNetV3 55.7, ResNet-34 63.3; ours not measured
yet.

As in the official code the student's unit embedding copies the teacher's as it is, on all eight
views, in the mean over dimensions and views and with half the weight of SwAV's loss (disagreement
W1). `objectives.distill.teacher_unit=true` is the paper's equation.
"""

from disco_jax.configs import common, swav


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", smoke=False
    )
    config = common.pretrain(arg.data, arg.smoke)
    config.name = "swav_disco"
    swav.testbed(config, arg)
    config.teacher.backbone = arg.teacher
    views = config.views + config.local.count
    # A mean over views and dimensions, halved: `Distill` adds the views and the dimensions.
    weight = 0.5 / (views * config.student.dim)
    config.objectives.distill.update(weight=weight, views=tuple(range(views)), teacher_unit=False)
    if arg.smoke:
        config.teacher.weights = "random"
    return config
