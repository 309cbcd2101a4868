r"""DINO with SSLight's view sampling, ImageNet-1k (arXiv:2210.02808).

    disco-jax pretrain --workdir gs://BUCKET/sslight_dino \
        --config configs/sslight_dino.py:student=mobilenetv2

Linear top-1 (Tables 4 and 5): MobileNetV2 68.3, ResNet-18 65.7, ResNet-34 69.7, ViT-Ti/16 69.5,
ViT-S/16 76.1; ours not measured yet. The batch of 1024 is 640 for ResNet-50 and ViT-S/16.

With the views of the baseline (66.2, 62.2, 67.7, 66.7, 75.4), for convolutional networks
    --config.augment.scale="(0.14,1.0)" --config.local.scale="(0.05,0.14)" --config.local.size=96
    --config.objectives.self_distill.global_share=-1
and for transformers 0.25 in place of 0.14. The paper scores the student (disagreement L6).
"""

from disco_jax.configs import common, dino


def get_config(arg=None):
    arg = common.parse(arg, student="mobilenetv2", data="imagenet2012", smoke=False)
    config = common.pretrain(arg.data, arg.smoke)
    config.name = "sslight_dino"
    common.sslight(config, arg, "dino", per_256=0.48)
    if common.is_transformer(arg.student):
        config.student.head = "dino"
        common.self_distill(config, arg, prototypes=65_536)
        warmup = 30
    else:
        config.student.head = "dino_bn"
        common.self_distill(config, arg, prototypes=4096)
        config.optimizer.fixed = ("prototypes/scale*",)
        warmup = 50
    config.objectives.self_distill.update(
        momentum_temperature=0.07,
        warmup_epochs=warmup,
        global_share=0.4,
    )
    if not common.is_large(arg):
        dino.small(config)
    return config
