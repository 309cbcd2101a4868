r"""Classifying K-means clusters of the teacher's features, which SEED compares with.

    disco-jax bags --workdir gs://BUCKET/clusters --config.teacher=gs://BUCKET/moco_v2 \
        --config.kind=kmeans --config.clusters=4096
    disco-jax pretrain --workdir gs://BUCKET/pseudo_labels \
        --config configs/pseudo_labels.py:student=resnet18,clusters=4096 \
        --config.bags.file=gs://BUCKET/clusters/bags.npz

SEED (arXiv:2101.04731), appendix A.4, with 4k and 16k clusters and images drawn evenly over them.
Linear top-1, R-50 -> R-18: paper 51.0; ours not measured yet. The classifier is the prototypes on
the features, without a bias; no teacher runs in the step.
"""

from disco_jax.configs import common


def get_config(arg=None):
    arg = common.parse(arg, student="resnet18", data="imagenet2012", clusters=4096, smoke=False)
    config = common.pretrain(arg.data, arg.smoke)
    config.name = "pseudo_labels"
    config.views = 1
    config.student.update(backbone=arg.student, head="none", prototypes=(arg.clusters,))
    config.objectives.pseudo_labels.weight = 1.0
    config.bags.sampling = "clusters"
    return config
