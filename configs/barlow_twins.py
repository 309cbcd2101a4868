r"""Barlow Twins' loss between a student and a frozen teacher (arXiv:2103.03230, eq. 1).

    disco-jax pretrain --workdir gs://BUCKET/barlow_twins \
        --config configs/barlow_twins.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

No paper reports this distillation; linear top-1 not measured yet. Everything but the objective is
as in seed.py.
"""

from disco_jax.configs import common, seed, small


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", smoke=False
    )
    config = common.pretrain("barlow_twins", arg.data)
    # As in seed.py with identical views (disagreements S2, S3).
    config.total_epochs, config.batch_size = 200, 256
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=seed.weight_decay(arg.student))
    config.learning_rate.update(per_256=0.03, decay="cosine", every="epoch")
    config.learning_rate.update(warmup_epochs=5, warmup_from=0.03)
    config.views = 1
    common.augment(config, "moco_v2")
    config.student.update(backbone=arg.student, head="mlp", hidden=-1, dim=128, norm="local")
    config.teacher.update(backbone=arg.teacher, hidden=-1, dim=128, norm="running")
    # Eq. 1 with the paper's lambda.
    config.objectives.cross_correlation.update(weight=1.0, view=0, redundancy=5e-3)
    return small.shrink(config, arg)
