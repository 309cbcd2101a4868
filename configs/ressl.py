r"""ReSSL on ImageNet-1k: similarities of a strong view copy those of a weak one.

    disco-jax pretrain --workdir gs://BUCKET/ressl --config configs/ressl.py:student=resnet18

arXiv:2107.09282; a testbed without a teacher, to which any distillation objective can be added.
Linear top-1: R-18 58.1 (as SSLight cites it); ours not measured yet. The official code decays no
BatchNorm parameters and biases; here all are decayed.
"""

from disco_jax.configs import common


def get_config(arg=None):
    arg = common.parse(arg, student="resnet18", data="imagenet2012", smoke=False)
    config = common.pretrain(arg.data, arg.smoke)
    config.name = "ressl"
    # View 1, the key, is cropped and flipped alone.
    with config.augment.ignore_type():
        config.augment.update(jitter_prob=(0.8, 0.0), grey_prob=(0.2, 0.0), blur_prob=(0.5, 0.0))
    config.student.backbone = arg.student
    if not arg.smoke:
        config.student.update(hidden=4096, dim=512)
    config.objectives.consistency.weight = 1.0
    config.learning_rate.update(per_256=0.05, every="step", warmup_epochs=5)
    return config
