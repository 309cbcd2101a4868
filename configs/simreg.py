r"""SimReg on ImageNet-1k: regress the teacher's features through an MLP (arXiv:2201.05131).

    disco-jax pretrain --workdir gs://BUCKET/simreg \
        --config configs/simreg.py:student=mobilenetv2,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

1-NN / linear top-1, MoCo-v2 R-50: MobileNetV2 55.5 / 69.1, R-18 54.8 / 65.1 (official README);
ours not measured yet. `--config.views=2 --config.objectives.distill.teacher_views="(1,)"` gives
each network its own view.
"""

from disco_jax.configs import common, small


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", smoke=False
    )
    config = common.pretrain("simreg", arg.data)
    # Official code (main.py, run.sh).
    config.total_epochs, config.batch_size = 130, 256
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=1e-4)
    config.learning_rate.update(base_lr=0.05, decay="cosine", every="epoch", warmup_epochs=0)
    # run.sh: one weak view for both networks.
    config.views = 1
    common.augment(config, "weak02")
    # mlp_arch.py: four layers, as wide as the teacher's features; dropped after the training.
    config.student.update(backbone=arg.student, head="regression", dim=0, norm="local")
    config.teacher.update(backbone=arg.teacher, norm="running")
    # The mean of 2 - 2 cos, as both sides have length 1.
    config.objectives.distill.update(weight=1.0, views=(0,), reduction="mean")
    config.objectives.distill.teacher_output = "features"
    return small.shrink(config, arg)
