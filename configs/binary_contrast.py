r"""Binary contrast against a queue of the teacher's embeddings, which SEED compares with.

    disco-jax pretrain --workdir gs://BUCKET/binary_contrast \
        --config configs/binary_contrast.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

SEED (arXiv:2101.04731), appendix A.4, with the form and temperature of CRD (arXiv:1910.10699).
Linear top-1, R-50 -> R-18: the paper's value was not to be had; ours not measured yet.
"""

from disco_jax.configs import seed


def get_config(arg=None):
    config = seed.get_config(arg)
    config.name = "binary_contrast"
    config.objectives.similarity.weight = 0.0
    config.objectives.binary_contrast.weight = 1.0
    return config
