r"""SwAV on ImageNet-1k (arXiv:2006.09882): a teacher, or the baseline of a lightweight student.

    disco-jax pretrain --workdir gs://BUCKET/swav \
        --config configs/swav.py:student=resnet50

Linear top-1: ResNet-50, batch 256, 200 epochs 72.7 (official code); EfficientNet-B0 46.8,
MobileNetV3 19.4, ResNet-34 63.3 (DisCo, Table 5, these settings); ours not measured yet.

The settings are those of DisCo's baselines: the schedule of SwAV's runs at a batch of 256, with a
batch of 512 and the rate not scaled (disagreement W2). SwAV's 4096 images a batch are:
    --config.batch_size=4096 --config.learning_rate.minimum=0.0048
    --config.learning_rate.warmup_epochs=10 --config.learning_rate.warmup_from=0.3
    --config.objectives.swapped.queue_size=0 --config.optimizer.frozen_steps=313
and a ResNet-50x2 takes --config.student.hidden=8192 --config.local.count=4 besides.
"""

from disco_jax.configs import common


def get_config(arg=None):
    arg = common.parse(arg, student="resnet50", data="imagenet2012", smoke=False)
    config = common.pretrain(arg.data, arg.smoke)
    config.name = "swav"
    testbed(config, arg)
    return config


def testbed(config, arg):
    """What swav_disco.py shares."""
    config.student.update(backbone=arg.student, head="swav")
    common.multicrop(config, arg, "swav", size=96, scale=(0.05, 0.14), count=6)
    config.optimizer.update(name="larc", weight_decay=1e-6)
    config.learning_rate.update(per_256=0.3, decay="cosine_after", every="step")
    if common.is_large(arg):
        config.batch_size = 512
        config.learning_rate.minimum = 0.0006
        config.optimizer.frozen_steps = 5005  # two epochs
    else:
        config.optimizer.frozen_epochs = 1
        config.learning_rate.per_256 = 8.0  # LARC moves a thousandth of it a step; runs are short
        config.local.update(count=2, scale=(0.3, 0.7))
        config.augment.scale = (0.5, 1.0)
    common.swapped(config, arg, queue_size=3840, queue_epochs=15)
