r"""SwAV with SSLight's view sampling, ImageNet-1k (arXiv:2210.02808).

    disco-jax pretrain --workdir gs://BUCKET/sslight_swav \
        --config configs/sslight_swav.py:student=mobilenetv2

Linear top-1, MobileNetV2: paper 67.3 (Table 3), 65.2 with the views of the baseline,
    --config.augment.scale="(0.14,1.0)" --config.local.scale="(0.05,0.14)" --config.local.size=96
    --config.objectives.swapped.global_share=-1
ours not measured yet.
"""

from disco_jax.configs import common
from disco_jax.data.presets import IMAGENET_STD


def get_config(arg=None):
    arg = common.parse(arg, student="mobilenetv2", data="imagenet2012", smoke=False)
    config = common.pretrain(arg.data, arg.smoke)
    config.name = "sslight_swav"
    common.sslight(config, arg, "swav", per_256=0.3)
    # Bicubic crops and the usual deviation, unlike SwAV's code (disagreement L5).
    config.augment.update(std=IMAGENET_STD, interpolation="bicubic")
    config.student.head = "swav_narrow"
    if arg.data in common.SMALL_QUEUES:
        # As in swav.py: short runs of narrow networks, which a narrow start lets collapse.
        config.student.head = "swav"
        config.optimizer.update(name="larc", no_decay=(), no_trust=())
        config.learning_rate.per_256 = 8.0
    if common.is_large(arg):
        config.student.hidden = 4096
        config.learning_rate.warmup_from = 0.075
    common.swapped(config, arg, queue_size=3840, queue_epochs=15)
    config.objectives.swapped.global_share = 0.4
    config.optimizer.frozen_epochs = 1
    return config
