r"""The plain squared distance to the teacher's embedding, which SEED compares with.

    disco-jax pretrain --workdir gs://BUCKET/squared_distance \
        --config configs/squared_distance.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

SEED (arXiv:2101.04731), appendix A.4. Linear top-1, R-50 -> R-18: the paper's value was not to be
had; ours not measured yet. All else as SEED.
"""

from disco_jax.configs import seed


def get_config(arg=None):
    config = seed.get_config(arg)
    config.name = "squared_distance"
    config.objectives.similarity.weight = 0.0
    config.objectives.distill.update(weight=1.0, views=(0,))
    return config
