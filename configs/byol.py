r"""BYOL on ImageNet-1k (arXiv:2006.07733): a teacher, or the baseline of a lightweight student.

    disco-jax pretrain --workdir gs://BUCKET/byol \
        --config configs/byol.py:student=resnet50,epochs=300

Linear top-1: ResNet-50 74.3 with 1000 epochs (paper, Table 1); ours not measured yet. `epochs` is
100, 300 or 1000, the presets of the official code (byol/configs/byol.py). Its last linear layers
have no bias.
"""

from disco_jax.configs import common, small
from disco_jax.errors import unknown

# Epochs -> learning rate for 256 images, weight decay, rate of the EMA at the start.
PRESETS = {100: (0.45, 1e-6, 0.99), 300: (0.3, 1e-6, 0.99), 1000: (0.2, 1.5e-6, 0.996)}


def get_config(arg=None):
    arg = common.parse(arg, student="resnet50", data="imagenet2012", epochs=300, smoke=False)
    if arg.epochs not in PRESETS:
        raise unknown("The recipe's argument epochs", str(arg.epochs), map(str, PRESETS))
    rate, decay, ema_rate = PRESETS[arg.epochs]
    config = common.pretrain("byol", arg.data)
    # Section 3.2: a batch of 4096; LARS on kernels only.
    config.total_epochs, config.batch_size = arg.epochs, 4096
    config.optimizer.update(name="lars", momentum=0.9, weight_decay=decay, trust=1e-3)
    config.optimizer.update(no_decay=("vectors",), no_trust=("vectors",))
    # 10 epochs of warm-up, then a cosine.
    config.learning_rate.update(base_lr=rate, decay="cosine_after", every="step")
    config.learning_rate.update(minimum=0.0, warmup_epochs=10, warmup_from=0.0)
    # Appendix B: two views that differ in blur and solarization, crops from 8 % of the area.
    config.views = 2
    common.augment(config, "dino")
    config.augment.scale = (0.08, 1.0)
    # Section 3.2: projector and predictor with BatchNorm over all devices, 4096 and 256 wide.
    config.student.update(backbone=arg.student, head="mlp_bn", hidden=4096, dim=256)
    config.student.update(predictor=4096, norm="sync")
    # The target network: its rate rises to 1, after the optimizer's step.
    config.momentum.update(ema_rate=ema_rate, ema_rate_end=1.0, follow="after", norm="sync")
    # Eq. 2 for both orders of the views.
    config.objectives.byol.update(weight=1.0, pairs=((0, 1), (1, 0)))
    # For objectives with a teacher that the command line adds.
    config.teacher.norm = "running"
    return small.shrink(config, arg)
