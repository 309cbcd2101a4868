r"""RETRO on ImageNet-1k: DisCo with the teacher's own head, and both views contrasted.

    disco-jax pretrain --workdir gs://BUCKET/retro \
        --config configs/retro.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

"Reusing teacher projection head for efficient embedding distillation on lightweight models via
self-supervised learning". Linear top-1, R-50 -> R-18: paper 62.9 (Table 4); ours not measured yet.
`retro:symmetric=false` is its first row, the head reused and nothing else: paper 62.5.

The paper came without code. The student's head is the teacher's, frozen, behind one learned linear
layer (disagreement R8); the distillation weighs what DisCo's does (D1); the two banks start random
(`objectives.contrast.queue_init=teacher` as D3). BatchNorm in a reused head keeps the teacher's
mode (R2). gamma is `objectives.contrast.weight`.
"""

from disco_jax.configs import common, disco


def get_config(arg=None):
    arg = common.parse(
        arg,
        student="resnet18",
        teacher="resnet50",
        data="imagenet2012",
        symmetric=True,
        smoke=False,
    )
    config = disco.get_config(common.join(arg, without="symmetric"))
    config.name = "retro" if arg.symmetric else "retro_head"
    config.student.reuse = ("head",)
    config.objectives.contrast.queue_init = "random"
    if arg.symmetric:
        config.objectives.contrast.pairs = ((0, 1), (1, 0))
    return config
