r"""MoCo-v2 on ImageNet-1k (arXiv:2003.04297): a teacher, or the baseline of a lightweight student.

    disco-jax pretrain --workdir gs://BUCKET/moco_v2 \
        --config configs/moco_v2.py:student=resnet50

Linear top-1: ResNet-50 67.4, ResNet-18 52.2, ResNet-34 56.8 (DisCo, Table 1, with the linear
rate 30); ours not measured yet.

DisCo's ResNet-152 is `student=resnet152,epochs=400` (disagreement M2). SEED's baselines are
`student=mobilenetv3_large,weight_decay=1e-5` (appendix A.1.2), with `hidden=0` those without a
deeper MLP (Table 6).
"""

from disco_jax.configs import common, small


def get_config(arg=None):
    arg = common.parse(
        arg,
        student="resnet50",
        data="imagenet2012",
        epochs=200,
        weight_decay=1e-4,
        hidden=-1,
        smoke=False,
    )
    config = common.pretrain("moco_v2", arg.data)
    # Official code (main_moco.py): 8 devices of 32 images; decay on all parameters.
    config.total_epochs, config.batch_size = arg.epochs, 256
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=arg.weight_decay)
    # Cosine schedule: MoCo-v2, section 2.
    config.learning_rate.update(base_lr=0.03, decay="cosine", every="epoch", warmup_epochs=0)
    # Two views; MoCo-v1's augmentation and blur (MoCo-v2, section 2).
    config.views = 2
    common.augment(config, "moco_v2")
    # A head of two layers as wide as the features: disagreement M1.
    config.student.update(backbone=arg.student, head="mlp", hidden=arg.hidden, dim=128)
    # BatchNorm per device; keys are encoded on shuffled images (MoCo-v1, section 3.3).
    config.student.norm = "local"
    config.momentum.update(ema_rate=0.999, norm="shuffle")
    # View 0 is the query, view 1 the key; temperature of MoCo-v2's official command.
    config.objectives.contrast.update(
        weight=1.0, pairs=((0, 1),), temperature=0.2, queue_size=65_536
    )
    return small.shrink(config, arg)
