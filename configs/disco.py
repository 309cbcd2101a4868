r"""DisCo on ImageNet-1k: a MoCo-v2 ResNet teaches a lightweight student (arXiv:2104.09124).

    disco-jax pretrain --workdir gs://BUCKET/disco \
        --config configs/disco.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

Linear top-1, R-50 -> R-18: paper 60.6 (Table 1); ours not measured yet. Section 4.2 distils SwAV's
ResNet-50x2 for longer: EfficientNet-B1 70.4 (`epochs=290`), MobileNetV3 64 (`epochs=340`).

Where the paper and the official code differ, this recipe follows the code. The paper's settings are
`objectives.distill.weight=1.0`, `teacher.norm=running` and `objectives.contrast.queue_init=random`.
"""

from disco_jax.configs import common, small


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", epochs=200, smoke=False
    )
    config = common.pretrain("disco", arg.data)
    # Section 4.1: 200 epochs; optimizer and rate of MoCo-v2, on all parameters.
    config.total_epochs, config.batch_size = arg.epochs, 256
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=1e-4)
    config.learning_rate.update(base_lr=0.03, decay="cosine", every="epoch", warmup_epochs=0)
    # Section 3.2: two views, with MoCo-v2's augmentation.
    config.views = 2
    common.augment(config, "moco_v2")
    # Section 4.1: heads of two layers, 2048 and 128 wide. The official code has no SyncBN.
    config.student.update(backbone=arg.student, head="mlp", hidden=2048, dim=128, norm="local")
    config.momentum.update(ema_rate=0.999, norm="shuffle")  # MoCo's EMA and shuffled BatchNorm
    # The teacher's head is as wide as its features; batch statistics: disagreement D2.
    config.teacher.update(backbone=arg.teacher, hidden=-1, dim=128, norm="local")
    # Section 3.4, with lambda = 1: view 0 is the query of the contrast, view 1 the key.
    config.objectives.contrast.update(weight=1.0, pairs=((0, 1),), temperature=0.2)
    config.objectives.contrast.update(queue_size=65_536, queue_init="teacher")  # disagreement D3
    # Eq. 1 on both views; 32 times the mean of the batch: disagreement D1.
    config.objectives.distill.update(weight=32.0, views=(0, 1), reduction="mean")
    return small.shrink(config, arg)
