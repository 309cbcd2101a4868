r"""Clusters of the teacher's embeddings that follow the batches, which SEED compares with.

    disco-jax pretrain --workdir gs://BUCKET/online_clusters \
        --config configs/online_clusters.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

SEED (arXiv:2101.04731), appendix A.4, which leaves the details open. Linear top-1, R-50 -> R-18:
paper 56.4; ours not measured yet.
"""

from disco_jax.configs import common, seed


def get_config(arg=None):
    config = seed.get_config(arg)
    config.name = "online_clusters"
    config.objectives.similarity.weight = 0.0
    config.objectives.online_clusters.weight = 1.0
    if config.data.name in common.SMALL_QUEUES:
        config.objectives.online_clusters.count = 64
    return config
