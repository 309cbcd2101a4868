r"""MoCo-v2* with SSLight's view sampling, ImageNet-1k (arXiv:2210.02808).

    disco-jax pretrain --workdir gs://BUCKET/sslight_moco \
        --config configs/sslight_moco.py:student=mobilenetv2

Linear top-1, MobileNetV2: paper 61.6 (Table 3), 60.6 with the views of the baseline,
    --config.augment.scale="(0.14,1.0)" --config.local.scale="(0.05,0.14)" --config.local.size=96
    --config.objectives.contrast.global_share=-1
ours not measured yet.

One global view makes the key, the other and all local ones are queries; nothing is symmetric.
"""

from disco_jax.configs import common


def get_config(arg=None):
    arg = common.parse(arg, student="mobilenetv2", data="imagenet2012", smoke=False)
    config = common.pretrain(arg.data, arg.smoke)
    config.name = "sslight_moco"
    common.sslight(config, arg, "dino", per_256=0.48)
    config.student.head = "mlp_narrow"
    if arg.data in common.SMALL_QUEUES:
        # Short runs of narrow networks: the head and the rates of MoCo-v2. The narrow start of the
        # paper's head collapses on a few features, and LARS's thousandth hardly moves a kernel.
        config.student.head = "mlp"
        config.momentum.ema_rate = 0.99
        config.optimizer.update(name="sgd", weight_decay=1e-4, no_decay=(), no_trust=())
        config.learning_rate.update(per_256=0.12, warmup_epochs=0)
    config.objectives.contrast.update(
        weight=1.0, pairs=((1, 0),), local_queries=True, global_share=0.4
    )
    return config
