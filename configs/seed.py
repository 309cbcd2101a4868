r"""SEED on ImageNet-1k, one view for both networks (arXiv:2101.04731).

    disco-jax pretrain --workdir gs://BUCKET/seed \
        --config configs/seed.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

Linear top-1, R-50 -> R-18: paper 57.6 (Table 1); ours not measured yet.

`views` selects a strategy of the appendix, figure 6: `identical`; `cross` (two large views);
`to_large` (six small views of the student, the teacher's large view); `small_patch` (both networks
see the small views, with a queue for each size). The last row of Table 1 is
    seed:teacher=resnet50w2,teacher_method=swav,views=small_patch,epochs=800

Ablations: `teacher_method=moco_v2|swav|simclr` (Table 3; the official code augments images as the
teacher's pre-training did), `moco=true` (Table 4: SEED + MoCo-v2), `hidden=0` (Table 6: no deeper
MLP), `views` with `teacher_method=swav` (Table 11). Appendix A.8 varies `rate` (Table 13),
`weight_decay` (Table 14) and `objectives.similarity.queue_size` (figure 7) from
    seed:teacher_method=swav,views=small_patch,weight_decay=1e-6
"""

from disco_jax.configs import common, small
from disco_jax.data.presets import LOCALS
from disco_jax.errors import UserError, unknown

PATCHES = range(1, 7)
# Strategy -> groups of (student view, teacher view); a queue a group.
GROUPS = {
    "identical": (((0, 0),),),
    "cross": (((0, 1),),),
    "to_large": (((0, 0),), tuple((patch, 0) for patch in PATCHES)),
    "small_patch": (((0, 0),), tuple((patch, patch) for patch in PATCHES)),
}
PATCHED = ("to_large", "small_patch")
# Pre-training of the teacher -> augmentation in the official code (tools/utils.py).
AUGMENTS = {"moco_v2": "moco_v2", "swav": "seed_swav", "simclr": "moco_v1"}
BY_BACKBONE = -1.0  # of the argument weight_decay


def get_config(arg=None):
    arg = common.parse(
        arg,
        student="resnet18",
        teacher="resnet50",
        data="imagenet2012",
        views="identical",
        teacher_method="moco_v2",
        epochs=200,
        rate=0.03,
        weight_decay=BY_BACKBONE,
        hidden=-1,
        moco=False,
        smoke=False,
    )
    _check(arg)
    config = common.pretrain(_name(arg), arg.data)
    # Section 4.1: SGD, 200 epochs, cosine. Weight decay by backbone: disagreement S3.
    config.total_epochs, config.batch_size = arg.epochs, 256
    decay = weight_decay(arg.student) if arg.weight_decay == BY_BACKBONE else arg.weight_decay
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=decay)
    config.learning_rate.update(base_lr=arg.rate, decay="cosine", every="epoch")
    # Section 4.1: 5 warm-up epochs. In the official code the rate is constant in them: S2.
    config.learning_rate.update(warmup_epochs=5, warmup_from=arg.rate)
    # Appendix A.1.1: MoCo-v2's augmentation. For other teachers it is the code's: S14.
    config.views = 2 if arg.views == "cross" or arg.moco else 1
    common.augment(config, AUGMENTS[arg.teacher_method])
    if arg.views in PATCHED:  # six crops of 96 px, scale 0.05 to 0.14, in one pass
        common.augment(config, "seed_swav")  # also changes the large crop's scale: disagreement S10
        config.local = dict(LOCALS["seed_swav"])
        config.group_views = True
    # Section 4.1: heads of two layers, 128 wide at the end; official code: hidden layers as wide
    # as the features, the teacher in evaluation mode.
    config.student.update(backbone=arg.student, head="mlp", hidden=arg.hidden, dim=128)
    config.student.norm = "local"
    config.teacher.update(backbone=arg.teacher, hidden=-1, dim=128, norm="running")
    # Eq. 5; section 4.1: temperatures (disagreement S1) and queue (S9).
    config.objectives.similarity.update(weight=1.0, groups=GROUPS[arg.views], queue_size=65_536)
    config.objectives.similarity.update(student_temperature=0.2, teacher_temperature=0.01)
    config.objectives.similarity.queue_init = "random"
    if arg.moco:  # Table 4; the weights of the two losses are not stated
        config.momentum.update(ema_rate=0.999, norm="shuffle")
        config.objectives.contrast.update(weight=1.0, pairs=((0, 1),), temperature=0.2)
        config.objectives.contrast.update(queue_size=65_536, queue_init="random")
    return small.shrink(config, arg)


def weight_decay(student):
    """Returns SEED's weight decay for a backbone (appendix A.1.2; disagreement S3)."""
    return 1e-5 if common.family(student) in ("efficientnet", "mobilenet") else 1e-4


def _check(arg):
    """Raises UserError if arguments are unknown or exclude each other."""
    if arg.views not in GROUPS:
        raise unknown("The recipe's argument views", arg.views, GROUPS)
    if arg.teacher_method not in AUGMENTS:
        raise unknown("The recipe's argument teacher_method", arg.teacher_method, AUGMENTS)
    if arg.moco and arg.views != "identical":
        raise UserError(
            f"The recipe's argument moco=true needs views=identical, not {arg.views}: SEED adds "
            "MoCo-v2's loss to distillation of one view."
        )


def _name(arg):
    """Returns the name of the strategy in tables and figures."""
    if arg.moco:
        return "seed_moco"
    return "seed" if arg.views == "identical" else f"seed_{arg.views}"
