r"""SEED on ImageNet-1k, one view for both networks (arXiv:2101.04731).

    disco-jax pretrain --workdir gs://BUCKET/seed \
        --config configs/seed.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

Linear top-1, R-50 -> R-18: paper 57.6 (Table 1); ours not measured yet.

The teacher's temperature is the paper's; the official code's default is 1e-4 (disagreement S1,
`objectives.similarity.teacher_temperature`). At the global batch of 256 the official warm-up is a
constant rate for 5 epochs, which is what `warmup_from` gives here (disagreement S2).
"""

from disco_jax.configs import common


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", smoke=False
    )
    config = common.pretrain(arg.data, arg.smoke)
    config.name = "seed"
    config.views = 1
    config.student.update(backbone=arg.student, hidden=-1)
    config.teacher.update(backbone=arg.teacher, hidden=-1, norm="running")  # in eval mode
    config.objectives.similarity.weight = 1.0
    config.learning_rate.update(warmup_epochs=5, warmup_from=0.03)
    if arg.smoke:
        config.teacher.weights = "random"
    return config
