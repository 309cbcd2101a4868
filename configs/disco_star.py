r"""DisCo*: DisCo with the student's head as wide as its features (arXiv:2104.09124, Table 4).

    disco-jax pretrain --workdir gs://BUCKET/disco_star \
        --config configs/disco_star.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

Linear top-1, R-50 -> R-18: paper 57.1 (Table 4), against 60.6 with a hidden width of 2048; ours
not measured yet.
"""

from disco_jax.configs import common, small


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", smoke=False
    )
    config = common.pretrain("disco_star", arg.data)
    # As in disco.py (section 4.1).
    config.total_epochs, config.batch_size = 200, 256
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=1e-4)
    config.learning_rate.update(base_lr=0.03, decay="cosine", every="epoch", warmup_epochs=0)
    config.views = 2
    common.augment(config, "moco_v2")
    # Section 4.7: the student's head has the width that SEED gives it.
    config.student.update(backbone=arg.student, head="mlp", hidden=-1, dim=128, norm="local")
    config.momentum.update(ema_rate=0.999, norm="shuffle")
    config.teacher.update(backbone=arg.teacher, hidden=-1, dim=128, norm="local")
    config.objectives.contrast.update(weight=1.0, pairs=((0, 1),), temperature=0.2)
    config.objectives.contrast.update(queue_size=65_536, queue_init="teacher")
    config.objectives.distill.update(weight=32.0, views=(0, 1), reduction="mean")
    return small.shrink(config, arg)
