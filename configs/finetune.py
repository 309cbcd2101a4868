r"""Fine-tuning of all layers of a run with labels, optionally with a teacher's classes beside them.

    disco-jax finetune --workdir RUN
    disco-jax finetune --workdir RUN --config.name=finetune_kd \
        --config.distill.teacher=TEACHER/finetune --config.distill.weight=0.5

The rates are SwAV's of its semi-supervised fine-tuning; with `kd` behind the colon a linear layer
alone learns from the teacher, DisCo's "KD" (Table 2), whose teacher is a linear probe's:

    disco-jax linear --workdir TEACHER --config configs/linear.py:protocol=disco
    disco-jax finetune --workdir RUN --config configs/finetune.py:protocol=kd \
        --config.distill.teacher=TEACHER/linear_disco

With a RUN of moco_v2.py that is KD alone, with one of disco.py KD + DisCo. Table 2, R-50 -> R-18:
51.5 and 60.6; ours not measured yet.
"""

from disco_jax.configs import common
from disco_jax.errors import unknown

PROTOCOLS = {
    "all": {
        "layers": "all",
        "norm": "sync",
        "total_epochs": 20,
        "learning_rate.per_256": 0.01,
        "learning_rate.milestones": (12, 16),
        "learning_rate.factor": 0.2,
        "head_rate": 20.0,
    },
    # alpha 0.5, T 2, the divergence averaged over the classes too (disagreement A1).
    "kd": {"distill.weight": 0.5},
}
SMALL = ("efficientnet", "mobilenet")


def get_config(arg=None):
    arg = common.parse(arg, protocol="all", student="")
    if arg.protocol not in PROTOCOLS:
        raise unknown("The recipe's argument protocol", arg.protocol, PROTOCOLS)
    config = common.classification("finetune" if arg.protocol == "all" else "linear_kd")
    config.student = arg.student
    config.update_from_flattened_dict(PROTOCOLS[arg.protocol])
    if arg.protocol == "kd" and arg.student.startswith(SMALL):
        config.learning_rate.per_256 = 3.0
    return config
