r"""Binary contrast against a queue of the teacher's embeddings, with which SEED compares itself.

    disco-jax pretrain --workdir gs://BUCKET/binary_contrast \
        --config configs/binary_contrast.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

SEED (arXiv:2101.04731), appendix A.4, with the form and temperature of CRD (arXiv:1910.10699).
Linear top-1, R-50 -> R-18: the paper's value is not available to us; ours not measured yet.
Everything but the objective is as in seed.py.
"""

from disco_jax.configs import common, seed, small


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", smoke=False
    )
    config = common.pretrain("binary_contrast", arg.data)
    # As in seed.py with identical views (disagreements S2, S3).
    config.total_epochs, config.batch_size = 200, 256
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=seed.weight_decay(arg.student))
    config.learning_rate.update(base_lr=0.03, decay="cosine", every="epoch")
    config.learning_rate.update(warmup_epochs=5, warmup_from=0.03)
    config.views = 1
    common.augment(config, "moco_v2")
    config.student.update(backbone=arg.student, head="mlp", hidden=-1, dim=128, norm="local")
    config.teacher.update(backbone=arg.teacher, hidden=-1, dim=128, norm="running")
    # Appendix A.4; form and temperature of CRD, eq. 17 and 18: disagreement B1.
    config.objectives.binary_contrast.update(
        weight=1.0, view=0, temperature=0.07, queue_size=65_536
    )
    return small.shrink(config, arg)
