r"""The squared distance to the teacher's embedding, with which SEED compares itself.

    disco-jax pretrain --workdir gs://BUCKET/squared_distance \
        --config configs/squared_distance.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

SEED (arXiv:2101.04731), appendix A.4. Linear top-1, R-50 -> R-18: the paper's value is not
available to us; ours not measured yet. Everything but the objective is as in seed.py.
"""

from disco_jax.configs import common, seed, small


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", smoke=False
    )
    config = common.pretrain("squared_distance", arg.data)
    # As in seed.py with identical views (disagreements S2, S3).
    config.total_epochs, config.batch_size = 200, 256
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=seed.weight_decay(arg.student))
    config.learning_rate.update(base_lr=0.03, decay="cosine", every="epoch")
    config.learning_rate.update(warmup_epochs=5, warmup_from=0.03)
    config.views = 1
    common.augment(config, "moco_v2")
    config.student.update(backbone=arg.student, head="mlp", hidden=-1, dim=128, norm="local")
    config.teacher.update(backbone=arg.teacher, hidden=-1, dim=128, norm="running")
    # Appendix A.4: the mean of |s - t|^2 over the batch, both of length 1.
    config.objectives.distill.update(weight=1.0, views=(0,), reduction="mean")
    return small.shrink(config, arg)
