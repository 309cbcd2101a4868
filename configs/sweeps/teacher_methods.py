r"""Teachers pre-trained by other methods (DisCo, arXiv:2104.09124, Table 6).

    disco-jax sweep --config sweeps/teacher_methods --workdir gs://BUCKET/table6 \
        --config.teachers.moco_v2.weights=moco_v2_200ep_pretrain.pth.tar \
        --config.teachers.sela_v2.weights=selav2_400ep_pretrain.pth.tar \
        --config.teachers.swav.weights=swav_800ep_pretrain.pth.tar

The teachers are ResNet-50s. The table shows the paper's linear top-1 beside ours; ours: not
measured yet.
"""

from disco_jax.configs import common, small
from disco_jax.configs.sweeps import common as sweeps
from disco_jax.configs.sweeps.hidden_width import STUDENTS

TEACHERS = ("moco_v2", "sela_v2", "swav")


def get_config(arg=None):
    arg = common.parse(arg, smoke=False)
    config = sweeps.sweep("teacher_methods")
    config.recipe = "disco"
    config.teachers = {name: sweeps.teacher("resnet50") for name in TEACHERS}
    config.axes = (("teacher", TEACHERS), ("student", STUDENTS))
    if arg.smoke:
        small.sweep(config)
        config.teachers = {name: sweeps.teacher("resnet8", "random") for name in TEACHERS[:2]}
        config.axes = (("teacher", TEACHERS[:2]), ("student", ("resnet8",)))
    return config
