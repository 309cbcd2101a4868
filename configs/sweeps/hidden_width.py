r"""Width of the projection head (DisCo, arXiv:2104.09124, Figure 9, Table 4).

    disco-jax sweep --config sweeps/hidden_width --workdir gs://BUCKET/hidden_width \
        --config.teachers.resnet50.weights=gs://BUCKET/moco_v2

Linear top-1 of the paper with a head as wide as the features and with 2048: R-18 57.1 and 60.6,
R-34 58.9 and 62.5, EfficientNet-B0 65.6 and 66.5, B1 65.8 and 66.6, MobileNet-v3 63.8 and 64.4;
ours not measured yet. A narrow head, not the backbone, limits how well the student matches the
teacher's embedding. `smoke=true` sweeps two tiny heads over the digits.
"""

from disco_jax.configs import common, small
from disco_jax.configs.sweeps import common as sweeps

STUDENTS = ("resnet18", "resnet34", "efficientnet_b0", "efficientnet_b1", "mobilenetv3_large")
WIDTHS = (0, 512, 1024, 1280, 2048, 4096, 8192)


def get_config(arg=None):
    arg = common.parse(arg, smoke=False)
    config = sweeps.sweep("hidden_width")
    config.recipe = "disco"
    config.teacher = "resnet50"
    config.teachers = dict(resnet50=sweeps.teacher("resnet50"))
    config.axes = (("student", STUDENTS), ("config.student.hidden", WIDTHS))
    config.figure.x = "config.student.hidden"
    if arg.smoke:
        small.sweep(config)
        config.axes = (("student", ("resnet8",)), ("config.student.hidden", (8, 32)))
    return config
