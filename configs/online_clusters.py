r"""Online clusters of the teacher's embeddings, with which SEED compares itself.

    disco-jax pretrain --workdir gs://BUCKET/online_clusters \
        --config configs/online_clusters.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

SEED (arXiv:2101.04731), appendix A.4, which leaves the details open. Linear top-1, R-50 -> R-18:
paper 56.4; ours not measured yet. Everything but the objective is as in seed.py.
"""

from disco_jax.configs import common, seed, small


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", smoke=False
    )
    config = common.pretrain("online_clusters", arg.data)
    # As in seed.py with identical views (disagreements S2, S3).
    config.total_epochs, config.batch_size = 200, 256
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=seed.weight_decay(arg.student))
    config.learning_rate.update(base_lr=0.03, decay="cosine", every="epoch")
    config.learning_rate.update(warmup_epochs=5, warmup_from=0.03)
    config.views = 1
    common.augment(config, "moco_v2")
    config.student.update(backbone=arg.student, head="mlp", hidden=-1, dim=128, norm="local")
    config.teacher.update(backbone=arg.teacher, hidden=-1, dim=128, norm="running")
    # Appendix A.4 gives no details. Ours: persistent centroids that move as an EMA.
    config.objectives.online_clusters.update(weight=1.0, view=0, count=4096, temperature=0.2)
    config.objectives.online_clusters.update(rate=0.9, idle=0.01)
    return small.shrink(config, arg)
