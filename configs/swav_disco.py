r"""DisCo on SwAV, ImageNet-1k: a SwAV ResNet-50 teaches a lightweight student (arXiv:2104.09124).

    disco-jax pretrain --workdir gs://BUCKET/swav_disco \
        --config configs/swav_disco.py:student=efficientnet_b0,teacher=resnet50 \
        --config.teacher.weights=swav_800ep_pretrain.pth.tar

Linear top-1 (Table 5): EfficientNet-B0 62.4, MobileNetV3 55.7, ResNet-34 63.3; ours not measured
yet.

The distance follows the official code: the teacher's embedding is not scaled to length 1
(disagreement W1). `objectives.distill.teacher_unit=true` is the paper's equation.
"""

from disco_jax.configs import common, small


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", smoke=False
    )
    config = common.pretrain("swav_disco", arg.data)
    # Official code of DisCo's baseline (swav-master): 8 devices of 64 images, and the schedule of
    # SwAV's runs at a batch of 256. The rate of 0.6 does not scale with the batch: disagreement W2.
    config.total_epochs, config.batch_size = 200, 512
    config.optimizer.update(name="larc", momentum=0.9, weight_decay=1e-6, trust=1e-3)
    config.learning_rate.update(base_lr=0.3, decay="cosine_after", every="step")
    config.learning_rate.update(minimum=0.0006, warmup_epochs=0)
    # Prototypes have length 1 and are frozen for the first two epochs.
    config.optimizer.update(unit_norm=("prototypes/kernel*",))
    config.optimizer.update(frozen_until=("prototypes/*",), frozen_steps=5005)
    # 2 + 6 crops, one pass a size; deviation of SwAV's code: disagreement W5.
    config.views, config.group_views = 2, True
    common.augment(config, "swav")
    config.local.update(count=6, size=96, scale=(0.05, 0.14))
    # A head with BatchNorm over all devices, 2048 and 128 wide; 3000 prototypes.
    config.student.update(backbone=arg.student, head="swav", hidden=2048, dim=128)
    config.student.update(prototypes=(3000,), norm="sync")
    # Stored statistics, unlike DisCo on MoCo-v2: disagreement W3.
    config.teacher.update(backbone=arg.teacher, norm="running")
    # Eq. 1 to 5; Sinkhorn and temperature of SwAV's code. Its queue of 3840 embeddings is cut to a
    # multiple of the batch.
    config.objectives.swapped.update(weight=1.0, assign=(0, 1), temperature=0.1)
    config.objectives.swapped.update(epsilon=0.05, iterations=3)
    config.objectives.swapped.update(queue_size=3584, queue_epochs=15)
    # Half the mean over all views and dimensions, the teacher's embedding as it is: W1.
    common.distill_elements(config)
    config.objectives.distill.teacher_unit = False
    # For objectives with an EMA copy that the command line adds.
    config.momentum.norm = "sync"
    return small.shrink(config, arg)
