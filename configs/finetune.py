r"""Fine-tuning of all layers of a run with labels, optionally also distilling a teacher's classes.

    disco-jax finetune --workdir RUN
    disco-jax finetune --workdir RUN --config.name=finetune_kd \
        --config.distill.teacher=TEACHER/finetune --config.distill.weight=0.5

The rates are those of SwAV's semi-supervised fine-tuning. `protocol=kd` trains only a linear layer
with a teacher: DisCo's "KD" (Table 2), whose teacher is a linear probe:

    disco-jax linear --workdir TEACHER --config configs/linear.py:protocol=disco
    disco-jax finetune --workdir RUN --config configs/finetune.py:protocol=kd \
        --config.distill.teacher=TEACHER/linear_disco

If RUN is of moco_v2.py this is KD alone, if of disco.py KD + DisCo. Table 2, R-50 -> R-18: 51.5 and
60.6; ours not measured yet.
"""

from disco_jax.configs import common, probes
from disco_jax.errors import unknown

PROTOCOLS = {
    # SwAV's official code (eval_semisup.py, 10 %).
    "all": {
        "layers": "all",
        "norm": "sync",
        "total_epochs": 20,
        "learning_rate.base_lr": 0.01,
        "learning_rate.milestones": (12, 16),
        "learning_rate.factor": 0.2,
        "head_rate": 20.0,
    },
    # DisCo's code: alpha 0.5, T 2; the divergence is also averaged over classes (disagreement A1).
    "kd": {"distill.weight": 0.5},
}


def get_config(arg=None):
    arg = common.parse(arg, protocol="all", student="")
    if arg.protocol not in PROTOCOLS:
        raise unknown("The recipe's argument protocol", arg.protocol, PROTOCOLS)
    config = probes.classification("finetune" if arg.protocol == "all" else "linear_kd")
    config.protocol, config.student = f"finetune:{arg.protocol}", arg.student
    config.update_from_flattened_dict(PROTOCOLS[arg.protocol])
    if arg.protocol == "kd":
        config.learning_rate.base_lr = probes.base_rate(arg.student)
    return config
