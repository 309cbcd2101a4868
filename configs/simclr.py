r"""SimCLR on ImageNet-1k (arXiv:2002.05709): a teacher, or the baseline of a lightweight student.

    disco-jax pretrain --workdir gs://BUCKET/simclr \
        --config configs/simclr.py:student=resnet50,epochs=1000

Linear top-1: ResNet-50 64.5 with 100 epochs (official code), 69.3 with 1000 (paper, Table 6); ours
not measured yet. SEED's Table 3 has a SimCLR teacher: `seed:teacher_method=simclr`.

The official code multiplies gradients by the learning rate before the momentum; here, as in
PyTorch, the rate multiplies the momentum, which differs only where the rate changes. The last
BatchNorm of its head has no offset.
"""

from disco_jax.configs import common, small


def get_config(arg=None):
    arg = common.parse(arg, student="resnet50", data="imagenet2012", epochs=100, smoke=False)
    config = common.pretrain("simclr", arg.data)
    # Section 2.3 and the official command: a batch of 4096, LARS, decay of kernels only.
    config.total_epochs, config.batch_size = arg.epochs, 4096
    config.optimizer.update(name="lars", momentum=0.9, weight_decay=1e-6, trust=1e-3)
    config.optimizer.update(no_decay=("vectors",), no_trust=("vectors",))
    # 0.3 for 256 images, 10 epochs of warm-up, then a cosine.
    config.learning_rate.update(base_lr=0.3, decay="cosine_after", every="step")
    config.learning_rate.update(minimum=0.0, warmup_epochs=10, warmup_from=0.0)
    # Appendix A: two views, crops from 8 % of the area, strength 1 of the colours, blur. The code
    # resizes crops bicubically and does not normalise pixels.
    config.views, config.group_views = 2, True
    common.augment(config, "swav")
    config.augment.update(scale=(0.08, 1.0), interpolation="bicubic")
    config.augment.update(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    # Section 2.2: statistics of BatchNorm over all devices. Official code: a head of two layers,
    # each with BatchNorm, as wide as the features and 128.
    config.student.update(backbone=arg.student, head="mlp_bn_all", hidden=-1, dim=128, norm="sync")
    # Eq. 1; temperature of the official command.
    config.objectives.nt_xent.update(weight=1.0, first=0, second=1, temperature=0.1)
    # For objectives with an EMA copy or a teacher that the command line adds.
    config.momentum.norm, config.teacher.norm = "sync", "running"
    return small.shrink(config, arg)
