r"""SwAV with SSLight's view sampling, ImageNet-1k (arXiv:2210.02808).

    disco-jax pretrain --workdir gs://BUCKET/sslight_swav \
        --config configs/sslight_swav.py:student=mobilenetv2

Linear top-1, MobileNetV2: paper 67.3 (Table 3), 65.2 with `views=baseline`; ours not measured yet.
"""

from disco_jax.configs import common, small, sslight_dino
from disco_jax.data.presets import IMAGENET_STD


def get_config(arg=None):
    arg = common.parse(
        arg, student="mobilenetv2", data="imagenet2012", views="ours", epochs=200, smoke=False
    )
    config = common.pretrain(sslight_dino.named("sslight_swav", arg.views), arg.data)
    # Table 8 and the official code: 8 devices of 128 images; last rate of the code: L1.
    config.total_epochs, config.batch_size = arg.epochs, 1024
    config.learning_rate.update(base_lr=0.3, decay="cosine_after", every="step")
    config.learning_rate.update(minimum=0.0048, warmup_epochs=10, warmup_from=0.075)
    # Biases and norms have neither decay nor trust ratio, depthwise kernels no decay: L2.
    config.optimizer.update(name="lars", momentum=0.9, weight_decay=1e-6, trust=1e-3)
    config.optimizer.update(no_decay=("vectors", "depthwise"), no_trust=("vectors",))
    # The prototypes have length 1 and are frozen for the first epoch.
    config.optimizer.update(unit_norm=("prototypes/kernel*",))
    config.optimizer.update(frozen_until=("prototypes/*",), frozen_epochs=1)
    # Table 8: N_l 6; one pass a size.
    config.views, config.group_views = 2, True
    common.augment(config, "swav")
    config.local.count = 6
    # Bicubic crops and ImageNet's deviation, unlike SwAV's code: disagreement L5.
    config.augment.update(std=IMAGENET_STD, interpolation="bicubic")
    # Official code: 4096 and 128 wide, 3000 prototypes, a narrow initialisation.
    config.student.update(backbone=arg.student, head="swav_narrow", hidden=4096, dim=128)
    config.student.update(prototypes=(3000,), norm="sync")
    if common.is_transformer(arg.student):
        sslight_dino.transformer(config)
    # The queue of 3840 embeddings is cut to a multiple of the batch.
    config.objectives.swapped.update(weight=1.0, assign=(0, 1))
    config.objectives.swapped.update(temperature=0.1, epsilon=0.05, iterations=3)
    config.objectives.swapped.update(queue_size=3072, queue_epochs=15)
    # Table 8: S_g 0.3, S_l 0.3, LC 128, alpha 0.4.
    sslight_dino.sample_views(config, "swapped", arg.views)
    # For objectives with an EMA copy or a teacher that the command line adds.
    config.momentum.norm, config.teacher.norm = "sync", "running"
    return small.shrink(config, arg, "sslight_swav")
