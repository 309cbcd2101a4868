r"""Students under several teachers (DisCo, arXiv:2104.09124, Table 1; RETRO, Table 1).

    disco-jax sweep --config sweeps/students_teachers --workdir gs://BUCKET/table1 \
        --config.teachers.resnet50.weights=gs://BUCKET/moco_v2_resnet50 \
        --config.teachers.resnet101.weights=gs://BUCKET/moco_v2_resnet101 \
        --config.teachers.resnet152.weights=gs://BUCKET/moco_v2_resnet152 \
        --config.teachers.resnet50w2.weights=swav_RN50w2_400ep_pretrain.pth.tar

Each of DisCo, RETRO and SEED with each pair; the table shows the papers' linear top-1 beside ours.
SEED has its own EfficientNets and MobileNetV3, and under SwAV's teacher small patches and 800
epochs. Ours: not measured yet. Students that share a teacher train in one step.
"""

from disco_jax.configs import common, small
from disco_jax.configs.papers import seed
from disco_jax.configs.sweeps import common as sweeps
from disco_jax.configs.sweeps.hidden_width import STUDENTS

SEED_STUDENTS = tuple(seed.NETWORKS.values())
TEACHERS = ("resnet50", "resnet101", "resnet152", "resnet50w2")  # SwAV's is the last


def get_config(arg=None):
    arg = common.parse(arg, smoke=False)
    config = sweeps.sweep("students_teachers")
    config.recipe = "disco"
    config.teachers = {name: sweeps.teacher(name) for name in TEACHERS}
    config.axes = (
        ("recipe", ("disco", "retro")),
        ("teacher", TEACHERS),
        ("student", STUDENTS),
    )
    config.further = (
        (("recipe", ("seed",)), ("teacher", TEACHERS[:-1]), ("student", SEED_STUDENTS)),
        (
            ("recipe", ("seed:teacher_method=swav,views=small_patch,epochs=800",)),
            ("teacher", TEACHERS[-1:]),
            ("student", SEED_STUDENTS),
        ),
    )
    if arg.smoke:
        small.sweep(config)
        config.axes = (
            ("recipe", tuple(map(small.recipe, ("seed", "disco")))),
            ("student", ("resnet8", "resnet14")),
        )
        config.further = ()
    return config
