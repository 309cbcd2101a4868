r"""Barlow Twins' loss between a student and a frozen teacher (arXiv:2103.03230, eq. 1).

    disco-jax pretrain --workdir gs://BUCKET/barlow_twins \
        --config configs/barlow_twins.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

No paper reports this distillation; linear top-1 is not measured yet. The loss and lambda are those
of Barlow Twins; data, networks and optimizer are those of SEED (arXiv:2101.04731).
"""

from disco_jax.configs import common, small


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", smoke=False
    )
    config = common.pretrain("barlow_twins", arg.data)
    # SEED, section 4.1: SGD, 200 epochs, cosine after 5 epochs at a constant rate.
    config.total_epochs, config.batch_size = 200, 256
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=1e-4)
    config.learning_rate.update(base_lr=0.03, decay="cosine", every="epoch")
    config.learning_rate.update(warmup_epochs=5, warmup_from=0.03)
    # SEED, appendix A.1.1: one view with MoCo-v2's augmentation.
    config.views = 1
    common.augment(config, "moco_v2")
    # SEED, section 4.1: heads of two layers, 128 wide at the end; the teacher in evaluation mode.
    config.student.update(backbone=arg.student, head="mlp", hidden=-1, dim=128, norm="local")
    config.teacher.update(backbone=arg.teacher, hidden=-1, dim=128, norm="running")
    # Barlow Twins, eq. 1: the sum over all correlations; section 2.2: lambda.
    config.objectives.cross_correlation.update(weight=1.0, view=0, redundancy=5e-3)
    return small.shrink(config, arg)
