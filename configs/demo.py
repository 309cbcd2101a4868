r"""The quick start: DisCo on 1,797 real handwritten digits, on any computer, without a download.

    disco-jax demo --workdir runs/quickstart

A MoCo-v2 teacher, then the same narrow student twice: with MoCo-v2 alone and with DisCo from that
teacher. Over three seeds (what the README states): --config.seeds="(0,1,2)".
"""

from disco_jax.configs import disco, knn, linear, moco_v2
from ml_collections import ConfigDict

TEACHER = dict(backbone="resnet8", width=16)
STUDENT = dict(backbone="resnet8", width=4)


def get_config(arg=None):
    del arg
    config = ConfigDict()
    config.seeds = (0,)
    config.teacher = _digits(moco_v2.get_config("student=resnet8,data=digits"))
    config.teacher.student.update(TEACHER, hidden=128)
    config.moco_v2 = _digits(moco_v2.get_config("student=resnet8,data=digits"))
    config.moco_v2.student.update(STUDENT, hidden=128)
    config.disco = _digits(disco.get_config("student=resnet8,teacher=resnet8,data=digits"))
    config.disco.student.update(STUDENT, hidden=128)
    config.disco.teacher.update(TEACHER, hidden=128)
    config.knn = knn.get_config()
    config.linear = linear.get_config()
    config.linear.learning_rate.per_256 = 3.0  # these features are larger than ImageNet's
    return config


def _digits(config: ConfigDict) -> ConfigDict:
    """What all three runs share."""
    config.learning_rate.per_256 = 0.12
    for objective in ("contrast", "similarity"):
        config.objectives[objective].queue_size = 1024
    return config
