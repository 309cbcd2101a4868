r"""DINO with SSLight's view sampling, ImageNet-1k (arXiv:2210.02808).

    disco-jax pretrain --workdir gs://BUCKET/sslight_dino \
        --config configs/sslight_dino.py:student=mobilenetv2

Linear top-1 (Tables 4 and 5): MobileNetV2 68.3, ResNet-18 65.7, ResNet-34 69.7, ViT-Ti/16 69.5,
ViT-S/16 76.1; ours not measured yet. The paper scores the student (disagreement L6).

`views` is ours, baseline (66.2, 62.2, 67.7, 66.7, 75.4), or one of the steps between them, which
Table 2 shows for MobileNetV2: crop_scale (67.0), then pixel_scale (67.9). Table 7 has `epochs=400`
(MobileNetV2 68.8, ResNet-18 66.8, ResNet-34 70.8).
"""

from disco_jax.configs import common, small
from disco_jax.errors import unknown

# Views -> crop scales S_g and S_l, local size LC and alpha (-1: all pairs weigh the same). Table 2
# adds one after the other; the baseline's scales are 0.25 for transformers.
VIEWS = {
    "baseline": ((0.14, 1.0), (0.05, 0.14), 96, -1.0),
    "crop_scale": ((0.3, 1.0), (0.05, 0.3), 96, -1.0),
    "pixel_scale": ((0.3, 1.0), (0.05, 0.3), 128, -1.0),
    "ours": ((0.3, 1.0), (0.05, 0.3), 128, 0.4),
}
# Section 4.3 and Table 8: networks that are too large for a batch of 1024 on 8 devices.
BATCHES = {"resnet50": 640, "vit_small_p16": 640}


def get_config(arg=None):
    arg = common.parse(
        arg, student="mobilenetv2", data="imagenet2012", views="ours", epochs=200, smoke=False
    )
    config = common.pretrain(named("sslight_dino", arg.views), arg.data)
    # Table 8 and the official code: 8 devices of 128 images; last rate of the code: L1. Batches of
    # some networks: L4.
    config.total_epochs, config.batch_size = arg.epochs, BATCHES.get(arg.student, 1024)
    config.learning_rate.update(base_lr=0.48, decay="cosine_after", every="step")
    config.learning_rate.update(minimum=0.0048, warmup_epochs=10, warmup_from=0.0)
    # Biases and norms have neither decay nor trust ratio, depthwise kernels no decay: L2.
    config.optimizer.update(name="lars", momentum=0.9, weight_decay=1e-6, trust=1e-3)
    config.optimizer.update(no_decay=("vectors", "depthwise"), no_trust=("vectors",))
    # The last layer: length 1 throughout, frozen for the first epoch.
    config.optimizer.update(frozen=("prototypes/scale*",))
    config.optimizer.update(frozen_until=("prototypes/*",), frozen_epochs=1)
    # Table 8: N_l 6; one pass a size.
    config.views, config.group_views = 2, True
    common.augment(config, "dino")
    config.local.count = 6
    # Official code: a head with BatchNorm, 2048, 2048 and 256 wide, 4096 outputs.
    config.student.update(backbone=arg.student, head="dino_bn", hidden=2048, dim=256)
    config.student.update(prototypes=(4096,), norm="sync")
    config.momentum.update(ema_rate=0.996, ema_rate_end=1.0, follow="after", norm="sync")
    # The target's temperature rises from 0.04 to 0.07.
    config.objectives.self_distill.update(weight=1.0, targets=(0, 1))
    config.objectives.self_distill.update(student_temperature=0.1, momentum_temperature=0.07)
    config.objectives.self_distill.update(warmup_temperature=0.04, warmup_epochs=50)
    config.objectives.self_distill.centre_rate = 0.9
    if common.is_transformer(arg.student):
        transformer(config)
        # No BatchNorm, 65,536 outputs of any length, a shorter warm-up of the temperature.
        config.student.update(head="dino", prototypes=(65_536,))
        config.optimizer.frozen = ()
        config.objectives.self_distill.warmup_epochs = 30
    # Table 8: S_g 0.3, S_l 0.3, LC 128, alpha 0.4.
    sample_views(config, "self_distill", arg.views)
    # For objectives with a teacher that the command line adds.
    config.teacher.update(dim=256, norm="running")
    return small.shrink(config, arg, "sslight_dino")


def named(recipe, views, further=()):
    """Returns the name in tables of a recipe with one of `VIEWS`.

    Args:
      recipe: its name with the views `ours`.
      views: an element of `VIEWS` or of `further`.
      further: views that only this recipe has.

    Raises:
      UserError: there are no such views.
    """
    if views not in (*VIEWS, *further):
        raise unknown("The recipe's argument views", views, (*VIEWS, *further))
    return recipe if views == "ours" else f"{recipe}_{views}"


def sample_views(config, objective, views):
    """Sets the crops of all views and the weight of global pairs in an objective."""
    scale, local_scale, size, share = VIEWS[views]
    if views == "baseline" and common.is_transformer(config.student.backbone):
        scale, local_scale = (0.25, 1.0), (0.05, 0.25)
    config.augment.scale = scale
    config.local.update(size=size, scale=local_scale)
    config.objectives[objective].global_share = share


def transformer(config):
    """Sets what SSLight's Table 8 and code change for ViTs: AdamW and 10 local views."""
    config.learning_rate.update(base_lr=5e-4, minimum=1e-5)
    config.optimizer.update(name="adamw", weight_decay=0.04, weight_decay_end=0.4)
    config.optimizer.no_decay = ("vectors",)
    config.local.count = 10
    config.student.drop_path = 0.1
