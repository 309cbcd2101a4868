r"""SwAV on ImageNet-1k (arXiv:2006.09882): a teacher, or the baseline of a lightweight student.

    disco-jax pretrain --workdir gs://BUCKET/swav \
        --config configs/swav.py:student=resnet50

Linear top-1: ResNet-50, batch 256, 200 epochs 72.7 (official code); EfficientNet-B0 46.8,
MobileNetV3 19.4, ResNet-34 63.3 (DisCo, Table 5, these settings); ours not measured yet.

`script` is disco, or one of SwAV's own (scripts/ of its official code): batch256, batch4096 and
rn50w2 for the teacher of DisCo's, SEED's and RETRO's last rows
(`student=resnet50w2,script=rn50w2,epochs=400`, 77.3). SwAV's runs have 100 to 800 epochs.
"""

from disco_jax.configs import common, small
from disco_jax.errors import unknown

_BATCH_4096 = {  # swav_400ep_pretrain.sh: 64 devices of 64 images
    "batch_size": 4096,
    "learning_rate.minimum": 0.0048,
    "learning_rate.warmup_epochs": 10,
    "learning_rate.warmup_from": 0.3,
    "student.norm_group": 512,  # apex's SyncBN in groups of 8 devices: disagreement W6
    "objectives.swapped.queue_size": 0,
    "objectives.swapped.queue_epochs": 0,
    "optimizer.frozen_steps": 313,
}
# Script -> fields that differ from DisCo's baseline.
SCRIPTS = {
    "disco": {},
    "batch256": {  # swav_200ep_bs256_pretrain.sh
        "batch_size": 256,
        "learning_rate.base_lr": 0.6,
        "objectives.swapped.queue_size": 3840,
    },
    "batch4096": _BATCH_4096,
    "rn50w2": {  # swav_RN50w2_400ep_pretrain.sh: 128 devices of 32 images
        **_BATCH_4096,
        "student.norm_group": 256,
        "local.count": 4,
        "student.hidden": 8192,
    },
}


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet50", data="imagenet2012", script="disco", epochs=200, smoke=False
    )
    if arg.script not in SCRIPTS:
        raise unknown("The recipe's argument script", arg.script, SCRIPTS)
    config = common.pretrain("swav", arg.data)
    # Official code of DisCo's baseline (swav-master): 8 devices of 64 images, and the schedule of
    # SwAV's runs at a batch of 256. The rate of 0.6 does not scale with the batch: disagreement W2.
    config.total_epochs, config.batch_size = arg.epochs, 512
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
    # Eq. 1 to 5; Sinkhorn and temperature of SwAV's code. Its queue of 3840 embeddings is cut to a
    # multiple of the batch.
    config.objectives.swapped.update(weight=1.0, assign=(0, 1), temperature=0.1)
    config.objectives.swapped.update(epsilon=0.05, iterations=3)
    config.objectives.swapped.update(queue_size=3584, queue_epochs=15)
    config.update_from_flattened_dict(SCRIPTS[arg.script])
    # For objectives with an EMA copy or a teacher that the command line adds.
    config.momentum.norm, config.teacher.norm = "sync", "running"
    return small.shrink(config, arg)
