r"""Classification of K-means clusters of the teacher's features, with which SEED compares itself.

    disco-jax bags --workdir gs://BUCKET/clusters --config.teacher=gs://BUCKET/moco_v2 \
        --config.kind=kmeans --config.clusters=4096
    disco-jax pretrain --workdir gs://BUCKET/pseudo_labels \
        --config configs/pseudo_labels.py:student=resnet18,clusters=4096 \
        --config.bags.file=gs://BUCKET/clusters/bags.npz

SEED (arXiv:2101.04731), appendix A.4. Linear top-1, R-50 -> R-18: paper 51.0; ours not measured
yet. No teacher runs in the step.
"""

from disco_jax.configs import common, small


def get_config(arg=None):
    arg = common.parse(arg, student="resnet18", data="imagenet2012", clusters=4096, smoke=False)
    config = common.pretrain("pseudo_labels", arg.data)
    # Training as in moco_v2.py.
    config.total_epochs, config.batch_size = 200, 256
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=1e-4)
    config.learning_rate.update(base_lr=0.03, decay="cosine", every="epoch", warmup_epochs=0)
    config.views = 1
    common.augment(config, "moco_v2")
    # The classifier: one prototype a cluster, directly on the features, without a bias.
    config.student.update(backbone=arg.student, head="none", prototypes=(arg.clusters,))
    config.student.norm = "local"
    # Appendix A.4: 4k or 16k clusters, sampled uniformly.
    config.bags.sampling = "clusters"
    config.objectives.pseudo_labels.update(weight=1.0, view=0)
    return small.shrink(config, arg)
