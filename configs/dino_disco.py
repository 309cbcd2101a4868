r"""DisCo on DINO, ImageNet-1k: a DINO transformer teaches a lightweight one (arXiv:2104.09124).

    disco-jax pretrain --workdir gs://BUCKET/dino_disco \
        --config configs/dino_disco.py:student=vit_tiny_p16,teacher=vit_small_p16 \
        --config.teacher.weights=dino_deitsmall16_pretrain_full_checkpoint.pth

Linear top-1 (appendix, Table 3): ViT-S/16 -> ViT-tiny 68.4, XCiT-small -> XCiT-tiny 71.1
(student=xcit_tiny_12_p16,teacher=xcit_small_12_p16); ours not measured yet.

No code was released for this testbed; what is compared, and the weight, are ours (disagreement N0).
The teacher's file must hold its head. If the teacher is a run, its EMA copy teaches
(`teacher.network=student` selects the other network).
"""

from disco_jax.configs import common, dino, small


def get_config(arg=None):
    arg = common.parse(
        arg, student="vit_tiny_p16", teacher="vit_small_p16", data="imagenet2012", smoke=False
    )
    config = common.pretrain("dino_disco", arg.data)
    # DINO as in dino.py, 100 epochs for transformers: disagreement N1.
    config.student.backbone = arg.student
    dino.method(config)
    # Appendix, section 6: a frozen teacher that DINO trained, in evaluation mode.
    config.teacher.update(backbone=arg.teacher, dim=256, norm="running", network="momentum")
    # Embeddings below the last layer, both of length 1, on both global views: N0.
    config.objectives.distill.update(weight=1.0, views=(0, 1), reduction="mean")
    return small.shrink(config, arg)
