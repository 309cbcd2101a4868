r"""RETRO on ImageNet-1k: DisCo with the teacher's own head, and both views contrasted.

    disco-jax pretrain --workdir gs://BUCKET/retro \
        --config configs/retro.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

"Reusing teacher projection head for efficient embedding distillation on lightweight models via
self-supervised learning". Linear top-1, R-50 -> R-18: paper 62.9 (Table 4); ours not measured yet.
`retro:symmetric=false` is the first row of that table, which only reuses the head: paper 62.5.

The paper has no code. Where it is silent, DisCo's settings are taken (disagreements D1, D2), the
two queues start random (`objectives.contrast.queue_init=teacher` as D3), and the adapter is one
linear layer with a bias (R8).
"""

from disco_jax.configs import common, small


def get_config(arg=None):
    arg = common.parse(
        arg,
        student="resnet18",
        teacher="resnet50",
        data="imagenet2012",
        symmetric=True,
        smoke=False,
    )
    config = common.pretrain("retro" if arg.symmetric else "retro_head", arg.data)
    # Section 4.1: 200 epochs; optimizer and rate of MoCo-v2.
    config.total_epochs, config.batch_size = 200, 256
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=1e-4)
    config.learning_rate.update(base_lr=0.03, decay="cosine", every="epoch", warmup_epochs=0)
    config.views = 2
    common.augment(config, "moco_v2")
    # The teacher's head, frozen, behind an adapter (R8); hidden and dim are the teacher's.
    config.student.update(backbone=arg.student, reuse=("head",), norm="local")
    # The mean student: an EMA, but for the head (R1).
    config.momentum.update(ema_rate=0.999, norm="shuffle")
    # Batch statistics, also in the head: D2, R2.
    config.teacher.update(backbone=arg.teacher, hidden=-1, dim=128, norm="local")
    # Eq. 4 with gamma = 1. Symmetric: each view is the query once; a queue for each key view.
    pairs = ((0, 1), (1, 0)) if arg.symmetric else ((0, 1),)
    config.objectives.contrast.update(weight=1.0, pairs=pairs, temperature=0.2)
    config.objectives.contrast.update(queue_size=65_536, queue_init="random")
    config.objectives.distill.update(weight=32.0, views=(0, 1), reduction="mean")  # D1
    return small.shrink(config, arg)
