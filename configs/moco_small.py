r"""MoCo-v2 tuned for small networks, ImageNet-1k, without a teacher (Shi et al., arXiv:2107.14762).

    disco-jax pretrain --workdir gs://BUCKET/moco_small \
        --config configs/moco_small.py:student=resnet18 \
        --config.student.weights=gs://BUCKET/seed

Linear top-1: ResNet-18 55.7 (as SSLight's Table 7 cites it); ours not measured yet.

The official command starts from a network that SEED distilled (`student.weights`, a run of
`seed.py`; for how many epochs it does not say) and restarts the schedule. Without it training
starts from random weights.
"""

from disco_jax.configs import common, small


def get_config(arg=None):
    arg = common.parse(arg, student="resnet18", data="imagenet2012", epochs=800, smoke=False)
    config = common.pretrain("moco_small", arg.data)
    # Official command (README.md, main_moco_final.py): a rate of 0.06 for 512 images.
    config.total_epochs, config.batch_size = arg.epochs, 512
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=1e-4)
    config.learning_rate.update(base_lr=0.03, decay="cosine", every="epoch", warmup_epochs=0)
    # Two views; stronger colours and more grey images than MoCo-v2's.
    config.views = 2
    common.augment(config, "moco_v2")
    config.augment.update(jitter=(0.8, 0.8, 0.8, 0.4), grey_prob=0.5)
    # A head that is twice as wide as the features (moco/builder.py, "wide").
    config.student.update(backbone=arg.student, head="mlp", dim=128, norm="local")
    config.student.hidden = 2 * common.features(config.student)
    config.momentum.update(ema_rate=0.999, norm="shuffle")
    # View 0 is the query, view 1 the key; a lower temperature than MoCo-v2's.
    config.objectives.contrast.update(
        weight=1.0, pairs=((0, 1),), temperature=0.1, queue_size=65_536
    )
    return small.shrink(config, arg)
