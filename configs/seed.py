r"""SEED on ImageNet-1k, one view for both networks (arXiv:2101.04731).

    disco-jax pretrain --workdir gs://BUCKET/seed \
        --config configs/seed.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

Linear top-1, R-50 -> R-18: paper 57.6 (Table 1); ours not measured yet.

`views` selects a strategy of the appendix, figure 6: `identical`; `cross` (two large views);
`to_large` (six small views of the student, the teacher's large view); `small_patch` (both networks
see the small views, with a queue for each size; the paper's last row trains 800 epochs under a SwAV
R-50w2).
"""

from disco_jax.configs import common, small
from disco_jax.data.presets import LOCALS
from disco_jax.errors import unknown

PATCHES = range(1, 7)
# Strategy -> groups of (student view, teacher view); a queue a group.
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
        raise unknown("The recipe's argument views", arg.views, GROUPS)
    name = "seed" if arg.views == "identical" else f"seed_{arg.views}"
    config = common.pretrain(name, arg.data)
    # Section 4.1: SGD, 200 epochs, cosine. Weight decay by backbone: disagreement S3.
    config.total_epochs, config.batch_size = 200, 256
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=weight_decay(arg.student))
    config.learning_rate.update(base_lr=0.03, decay="cosine", every="epoch")
    # Section 4.1: 5 warm-up epochs. In the official code the rate is constant in them: S2.
    config.learning_rate.update(warmup_epochs=5, warmup_from=0.03)
    # Appendix A.1.1: MoCo-v2's augmentation.
    config.views = 2 if arg.views == "cross" else 1
    common.augment(config, "moco_v2")
    if arg.views in ("to_large", "small_patch"):  # six crops of 96 px, scale 0.05 to 0.14
        common.augment(config, "seed_swav")  # also changes the large crop's scale: disagreement S10
        config.local = dict(LOCALS["seed_swav"])
    # Section 4.1: heads of two layers, 128 wide at the end; official code: hidden layers as wide
    # as the features, the teacher in evaluation mode.
    config.student.update(backbone=arg.student, head="mlp", hidden=-1, dim=128, norm="local")
    config.teacher.update(backbone=arg.teacher, hidden=-1, dim=128, norm="running")
    # Eq. 5; section 4.1: temperatures (disagreement S1) and queue (S9).
    config.objectives.similarity.update(weight=1.0, groups=GROUPS[arg.views], queue_size=65_536)
    config.objectives.similarity.update(student_temperature=0.2, teacher_temperature=0.01)
    config.objectives.similarity.queue_init = "random"
    return small.shrink(config, arg)


def weight_decay(student: str) -> float:
    """Returns SEED's weight decay for a backbone (appendix A.1.2; disagreement S3)."""
    return 1e-5 if student.startswith(("efficientnet", "mobilenet")) else 1e-4
