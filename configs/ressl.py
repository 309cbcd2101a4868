r"""ReSSL on ImageNet-1k: similarities of a strong view copy those of a weak view.

    disco-jax pretrain --workdir gs://BUCKET/ressl --config configs/ressl.py:student=resnet18

arXiv:2107.09282; a testbed without a teacher, to which any distillation objective can be added.
Linear top-1: R-18 58.1 (as SSLight cites it); ours not measured yet.
"""

from disco_jax.configs import common, small


def get_config(arg=None):
    arg = common.parse(arg, student="resnet18", data="imagenet2012", smoke=False)
    config = common.pretrain("ressl", arg.data)
    # Official code (ressl.py).
    config.total_epochs, config.batch_size = 200, 256
    # BatchNorm parameters and biases do not decay.
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=1e-4, no_decay=("vectors",))
    # 5 epochs of warm-up from 0; the cosine starts after them.
    config.learning_rate.update(base_lr=0.05, decay="cosine_after", every="step")
    config.learning_rate.update(minimum=0.0, warmup_epochs=5, warmup_from=0.0)
    # View 0, the query: MoCo-v2's augmentation. View 1, the key: crops and flips only.
    config.views = 2
    common.augment(config, "moco_v2")
    with config.augment.ignore_type():  # a probability for each view
        config.augment.update(jitter_prob=(0.8, 0.0), grey_prob=(0.2, 0.0), blur_prob=(0.5, 0.0))
    # network/ressl.py: a head 4096 and 512 wide.
    config.student.update(backbone=arg.student, head="mlp", hidden=4096, dim=512, norm="local")
    config.momentum.update(ema_rate=0.999, norm="shuffle")
    # Eq. 5; temperatures and queue of the official code.
    config.objectives.consistency.update(weight=1.0, query_view=0, key_view=1, queue_size=131_072)
    config.objectives.consistency.update(student_temperature=0.1, target_temperature=0.04)
    return small.shrink(config, arg)
