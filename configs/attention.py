r"""MoCo-v2 with attention transfer (AT, arXiv:1612.03928), as DisCo compares with it.

    disco-jax pretrain --workdir gs://BUCKET/attention \
        --config configs/attention.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

Linear top-1, R-50 -> R-18: DisCo's Table 2 56.2; ours not measured yet. `attention:disco=true`
adds DisCo's distance: 60.2.

DisCo's code has the loss and never calls it, so layers and weight are AT's own (disagreement A3).
Between networks whose maps differ in size: `objectives.attention.resize=linear`.
"""

from disco_jax.configs import common, disco


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", disco=False, smoke=False
    )
    config = disco.get_config(common.join(arg, without="disco"))
    config.name = "disco_attention" if arg.disco else "attention"
    config.objectives.attention.weight = 1000.0
    if not arg.disco:
        config.objectives.distill.weight = 0.0
    return config
