r"""MoCo-v2* with SSLight's view sampling, ImageNet-1k (arXiv:2210.02808).

    disco-jax pretrain --workdir gs://BUCKET/sslight_moco \
        --config configs/sslight_moco.py:student=mobilenetv2

Linear top-1, MobileNetV2: paper 61.6 (Table 3), 60.6 with `views=baseline`, 53.8 with `views=two`
(Table 1, MoCo-v2 without local views: disagreement L9); ours not measured yet.
"""

from disco_jax.configs import common, small, sslight_dino


def get_config(arg=None):
    arg = common.parse(
        arg, student="mobilenetv2", data="imagenet2012", views="ours", epochs=200, smoke=False
    )
    name = sslight_dino.named("sslight_moco", arg.views, further=("two",))
    config = common.pretrain(name, arg.data)
    # Table 8 and the official code: 8 devices of 128 images; last rate of the code: L1.
    config.total_epochs, config.batch_size = arg.epochs, 1024
    config.learning_rate.update(base_lr=0.48, decay="cosine_after", every="step")
    config.learning_rate.update(minimum=0.0048, warmup_epochs=10, warmup_from=0.0)
    # Biases and norms have neither decay nor trust ratio, depthwise kernels no decay: L2.
    config.optimizer.update(name="lars", momentum=0.9, weight_decay=1e-6, trust=1e-3)
    config.optimizer.update(no_decay=("vectors", "depthwise"), no_trust=("vectors",))
    # Table 8: N_l 6; one pass a size.
    config.views, config.group_views = 2, True
    common.augment(config, "dino")
    config.local.count = 6
    # Official code: a head without BatchNorm and with a narrow initialisation, 2048 and 128 wide.
    config.student.update(backbone=arg.student, head="mlp_narrow", hidden=2048, dim=128)
    config.student.norm = "sync"
    config.momentum.update(ema_rate=0.999, norm="sync")
    if common.is_transformer(arg.student):
        sslight_dino.transformer(config)
    # Global view 0 is the key; view 1 and all local views are queries.
    config.objectives.contrast.update(weight=1.0, pairs=((1, 0),), local_queries=True)
    config.objectives.contrast.update(temperature=0.2, queue_size=65_536)
    # Table 8: S_g 0.3, S_l 0.3, LC 128, alpha 0.4.
    sslight_dino.sample_views(config, "contrast", "baseline" if arg.views == "two" else arg.views)
    if arg.views == "two":
        config.local.count, config.objectives.contrast.local_queries = 0, False
    # For objectives with a teacher that the command line adds.
    config.teacher.norm = "running"
    return small.shrink(config, arg, name if arg.views == "two" else "sslight_moco")
