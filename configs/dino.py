r"""DINO on ImageNet-1k (arXiv:2104.14294): a teacher, or the baseline of a lightweight student.

    disco-jax pretrain --workdir gs://BUCKET/dino \
        --config configs/dino.py:student=vit_tiny_p16

Linear top-1: ViT-tiny 63.2, XCiT-tiny 67.0 (DisCo, appendix, Table 3, 100 epochs); ViT-S/16 74.0
(official code, 100 epochs); ours not measured yet.

Convolutional networks are trained as in SSLight's baseline: LARS, a head with BatchNorm and 4096
outputs, 200 epochs; MobileNetV2 66.2, ResNet-18 62.2 (arXiv:2210.02808, Table 4). Its view
sampling is in `sslight_dino.py`. `knn` and `linear` score the student; `--config.network=momentum`
scores the EMA copy, as DINO reports.
"""

from disco_jax.configs import common


def get_config(arg=None):
    arg = common.parse(arg, student="vit_tiny_p16", data="imagenet2012", smoke=False)
    config = common.pretrain(arg.data, arg.smoke)
    config.name = "dino"
    testbed(config, arg)
    return config


def testbed(config, arg):
    """What dino_disco.py shares."""
    if common.is_transformer(arg.student):
        config.student.update(backbone=arg.student, head="dino", drop_path=0.1)
        common.multicrop(config, arg, "dino", size=96, scale=(0.05, 0.4), count=8)
        common.self_distill(config, arg, prototypes=65_536)
        config.optimizer.update(
            name="adamw",
            weight_decay=0.04,
            weight_decay_end=0.4,
            no_decay=("vectors",),
            clip=3.0,
        )
        config.learning_rate.update(per_256=5e-4, minimum=1e-6)
        if common.is_large(arg):
            config.update(batch_size=512, total_epochs=100)
    else:
        common.sslight(config, arg, "dino", per_256=0.48)
        config.student.head = "dino_bn"
        config.augment.scale = (0.14, 1.0)
        config.local.scale = (0.05, 0.14)
        common.self_distill(config, arg, prototypes=4096)
        config.objectives.self_distill.update(momentum_temperature=0.07, warmup_epochs=50)
        if common.is_large(arg):
            config.local.size = 96
    config.optimizer.fixed = ("prototypes/scale*",)
    config.learning_rate.update(decay="cosine_after", every="step", warmup_epochs=10)
    common.small_patches(config.student, arg, config.augment.size)
    if not common.is_large(arg):
        small(config)


def small(config):
    """Gentler views, and what short runs on small images learn by.

    Where the last layer learns, its scores level out before the network knows a view from another,
    and all images get the same targets. Here it stays as it started.
    """
    config.augment.scale = (0.5, 1.0)
    config.local.update(count=2, scale=(0.3, 0.7))
    config.momentum.ema_rate = 0.99
    config.objectives.self_distill.update(momentum_temperature=0.04, warmup_epochs=0)
    config.optimizer.update(
        name="adamw",
        weight_decay=0.0,
        weight_decay_end=-1.0,
        clip=3.0,
        fixed=("prototypes/*",),
        frozen=(),
        frozen_epochs=0,
    )
    config.learning_rate.update(per_256=8e-3, warmup_epochs=2)
