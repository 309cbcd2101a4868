r"""MoCo-v2 with attention transfer (AT, arXiv:1612.03928), as DisCo compares with it.

    disco-jax pretrain --workdir gs://BUCKET/attention \
        --config configs/attention.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

Linear top-1, R-50 -> R-18: DisCo's Table 2 56.2; ours not measured yet. `attention:disco=true`
adds DisCo's distance: 60.2.

Networks whose maps differ in size need `objectives.attention.resize=linear`.
"""

from disco_jax.configs import common, small


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", disco=False, smoke=False
    )
    config = common.pretrain("disco_attention" if arg.disco else "attention", arg.data)
    # As in disco.py (DisCo, section 4.4).
    config.total_epochs, config.batch_size = 200, 256
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=1e-4)
    config.learning_rate.update(base_lr=0.03, decay="cosine", every="epoch", warmup_epochs=0)
    config.views = 2
    common.augment(config, "moco_v2")
    config.student.update(backbone=arg.student, head="mlp", hidden=2048, dim=128, norm="local")
    config.momentum.update(ema_rate=0.999, norm="shuffle")
    config.teacher.update(backbone=arg.teacher, hidden=-1, dim=128, norm="local")
    config.objectives.contrast.update(weight=1.0, pairs=((0, 1),), temperature=0.2)
    config.objectives.contrast.update(queue_size=65_536, queue_init="teacher")
    # Layers and weight of AT's own code, as DisCo's never calls the loss: disagreement A3.
    config.objectives.attention.update(weight=1000.0, view=0, layers="all", resize="none")
    # DisCo's distance (disagreement D1).
    config.objectives.distill.update(weight=32.0 if arg.disco else 0.0, views=(0, 1))
    return small.shrink(config, arg)
