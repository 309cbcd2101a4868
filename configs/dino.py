r"""DINO on ImageNet-1k (arXiv:2104.14294): a teacher, or the baseline of a lightweight student.

    disco-jax pretrain --workdir gs://BUCKET/dino \
        --config configs/dino.py:student=vit_tiny_p16

Linear top-1: ViT-tiny 63.2, XCiT-tiny 67.0 (DisCo, appendix, Table 3, 100 epochs); ViT-S/16 74.0
(official code, 100 epochs); ours not measured yet.

Convolutional networks train as in SSLight's baseline (arXiv:2210.02808, Table 4): MobileNetV2 66.2,
ResNet-18 62.2. SSLight's own views and its baselines of ViTs are in `sslight_dino.py`. `linear`
scores the EMA copy, as DINO reports, and `knn` the student; `--config.network=momentum` scores the
EMA copy there, too.
"""

from disco_jax.configs import common, small, sslight_dino


def get_config(arg=None):
    arg = common.parse(arg, student="vit_tiny_p16", data="imagenet2012", smoke=False)
    config = common.pretrain("dino", arg.data)
    config.student.backbone = arg.student
    method(config)
    # For objectives with a teacher that the command line adds.
    config.teacher.update(dim=256, norm="running")
    return small.shrink(config, arg)


def method(config):
    """Sets DINO's networks, views, objective and training for `config.student.backbone`."""
    if common.is_transformer(config.student.backbone):
        transformer(config)
    else:
        convolutional(config)


def transformer(config):
    """Sets DINO as its official code trains ViTs and XCiTs."""
    # Official code (main_dino.py): 8 devices of 64 images; rate and weight decay follow a cosine;
    # vectors do not decay; gradients are clipped tensor by tensor.
    config.total_epochs, config.batch_size = 100, 512
    config.optimizer.update(name="adamw", no_decay=("vectors",), clip=3.0)
    config.optimizer.update(weight_decay=0.04, weight_decay_end=0.4)
    config.learning_rate.update(base_lr=5e-4, decay="cosine_after", every="step")
    config.learning_rate.update(minimum=1e-6, warmup_epochs=10, warmup_from=0.0)
    # The last layer: length 1 throughout (norm_last_layer), frozen for the first epoch.
    config.optimizer.update(frozen=("prototypes/scale*",))
    config.optimizer.update(frozen_until=("prototypes/*",), frozen_epochs=1)
    # 2 + 8 crops, one pass a size.
    config.views, config.group_views = 2, True
    common.augment(config, "dino")
    config.local.update(count=8, size=96, scale=(0.05, 0.4))
    # Head 2048, 2048 and 256 wide, 65,536 outputs, no BatchNorm.
    config.student.update(head="dino", hidden=2048, dim=256, prototypes=(65_536,))
    config.student.update(drop_path=0.1, norm="sync")
    # The EMA copy is the target network: cosine from 0.996 to 1, after the optimizer's step.
    config.momentum.update(ema_rate=0.996, ema_rate_end=1.0, follow="after", norm="sync")
    # Eq. 1 to 4; temperatures without a warm-up.
    config.objectives.self_distill.update(weight=1.0, targets=(0, 1), centre_rate=0.9)
    config.objectives.self_distill.update(student_temperature=0.1, momentum_temperature=0.04)
    config.objectives.self_distill.update(warmup_temperature=0.04, warmup_epochs=0)


def convolutional(config):
    """Sets DINO as SSLight's baseline trains convolutional networks (its Table 8 and code)."""
    # 8 devices of 128 images; fewer for ResNet-50: L4.
    config.total_epochs = 200
    config.batch_size = sslight_dino.BATCHES.get(config.student.backbone, 1024)
    # Biases and norms have neither decay nor trust ratio, depthwise kernels no decay: L2.
    config.optimizer.update(name="lars", momentum=0.9, weight_decay=1e-6, trust=1e-3)
    config.optimizer.update(no_decay=("vectors", "depthwise"), no_trust=("vectors",))
    config.learning_rate.update(base_lr=0.48, decay="cosine_after", every="step")
    config.learning_rate.update(minimum=0.0048, warmup_epochs=10, warmup_from=0.0)  # L1
    config.optimizer.update(frozen=("prototypes/scale*",))
    config.optimizer.update(frozen_until=("prototypes/*",), frozen_epochs=1)
    # 2 + 6 crops, one pass a size.
    config.views, config.group_views = 2, True
    common.augment(config, "dino")
    config.augment.scale = (0.14, 1.0)
    config.local.update(count=6, size=96, scale=(0.05, 0.14))
    # Head with BatchNorm, 2048, 2048 and 256 wide, 4096 outputs.
    config.student.update(head="dino_bn", hidden=2048, dim=256, prototypes=(4096,), norm="sync")
    config.momentum.update(ema_rate=0.996, ema_rate_end=1.0, follow="after", norm="sync")
    # The target's temperature rises from 0.04 to 0.07 in 50 epochs.
    config.objectives.self_distill.update(weight=1.0, targets=(0, 1), centre_rate=0.9)
    config.objectives.self_distill.update(student_temperature=0.1, momentum_temperature=0.07)
    config.objectives.self_distill.update(warmup_temperature=0.04, warmup_epochs=50)
