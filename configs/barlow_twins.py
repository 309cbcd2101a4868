r"""Barlow Twins' loss between a student and a frozen teacher (arXiv:2103.03230, eq. 1).

    disco-jax pretrain --workdir gs://BUCKET/barlow_twins \
        --config configs/barlow_twins.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

No paper reports this distillation; linear top-1 is not measured yet. The loss and lambda are those
of Barlow Twins. Data, networks and optimizer are those of SEED (`configs/seed.py`).
"""

from disco_jax.configs import seed


def get_config(arg=None):
    config = seed.get_config(arg)
    config.name = "barlow_twins"
    config.objectives.similarity.weight = 0.0
    config.objectives.cross_correlation.update(
        weight=1.0,  # the sum over correlations as in eq. 1
        redundancy=5e-3,  # lambda of the paper
    )
    return config
