r"""SEED on ImageNet-1k, one view for both networks (arXiv:2101.04731).

    disco-jax pretrain --workdir gs://BUCKET/seed \
        --config configs/seed.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

Linear top-1, R-50 -> R-18: paper 57.6 (Table 1); ours not measured yet.

The views of its appendix, figure 6: `views=identical`, `cross` (two large ones), `to_large` (six
small ones are compared with the teacher's large one) and `small_patch` (with its small one, and a
queue for each size; 800 epochs and a SwAV R-50w2 in the paper's last row).

The teacher's temperature is the paper's; the official code's default is 1e-4 (disagreement S1,
`objectives.similarity.teacher_temperature`). At the global batch of 256 the official warm-up is a
constant rate for 5 epochs, which is what `warmup_from` gives here (disagreement S2). The weight
decay is 1e-5 for EfficientNets and MobileNets (disagreement S3). With small patches the large
crops change their scale too (disagreement S10).
"""

from disco_jax.configs import common
from disco_jax.data.presets import LOCALS

PATCHES = range(1, 7)
GROUPS = {
    "identical": (((0, 0),),),
    "cross": (((0, 1),),),
    "to_large": (((0, 0),), tuple((patch, 0) for patch in PATCHES)),
    "small_patch": (((0, 0),), tuple((patch, patch) for patch in PATCHES)),
}


def get_config(arg=None):
    arg = common.parse(
        arg,
        student="resnet18",
        teacher="resnet50",
        data="imagenet2012",
        views="identical",
        smoke=False,
    )
    if arg.views not in GROUPS:
        raise common.unknown("The recipe's argument views", arg.views, GROUPS)
    config = common.pretrain(arg.data, arg.smoke)
    config.name = "seed" if arg.views == "identical" else f"seed_{arg.views}"
    config.views = 2 if arg.views == "cross" else 1
    config.student.update(backbone=arg.student, hidden=-1)
    config.teacher.update(backbone=arg.teacher, hidden=-1, norm="running")  # in eval mode
    config.objectives.similarity.update(weight=1.0, groups=GROUPS[arg.views])
    config.learning_rate.update(warmup_epochs=5, warmup_from=0.03)
    if arg.student.startswith(("efficientnet", "mobilenet")):
        config.optimizer.weight_decay = 1e-5
    if arg.views in ("to_large", "small_patch"):
        common.augment(config, "seed_swav")
        config.local = dict(LOCALS["seed_swav"])
        if arg.data in common.SMALL_QUEUES or arg.smoke:
            config.local.update(size=config.augment.size // 2, scale=(0.1, 0.3))
    if arg.smoke:
        config.teacher.weights = "random"
    return config
