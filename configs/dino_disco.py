r"""DisCo on DINO, ImageNet-1k: a DINO transformer teaches a lightweight one (arXiv:2104.09124).

    disco-jax pretrain --workdir gs://BUCKET/dino_disco \
        --config configs/dino_disco.py:student=vit_tiny_p16,teacher=vit_small_p16 \
        --config.teacher.weights=dino_deitsmall16_pretrain_full_checkpoint.pth

Linear top-1 (appendix, Table 3): ViT-S/16 -> ViT-tiny 68.4, XCiT-small -> XCiT-tiny 71.1
(student=xcit_tiny_12_p16,teacher=xcit_small_12_p16); ours not measured yet.

No code was released for this testbed. Ours: the unit embedding below the last layer copies the
frozen teacher's on both global views, weight 1; other weights are
`objectives.distill.weight`, all views `objectives.distill.views`. The teacher's file must hold its
head. Of a run as the teacher, the EMA copy teaches (`teacher.network=student` for the other).
"""

from disco_jax.configs import common, dino


def get_config(arg=None):
    arg = common.parse(
        arg, student="vit_tiny_p16", teacher="vit_small_p16", data="imagenet2012", smoke=False
    )
    config = common.pretrain(arg.data, arg.smoke)
    config.name = "dino_disco"
    dino.testbed(config, arg)
    config.teacher.update(backbone=arg.teacher, network="momentum")
    common.small_patches(config.teacher, arg, config.augment.size)
    config.objectives.distill.weight = 1.0
    if arg.smoke:
        config.teacher.weights = "random"
    return config
