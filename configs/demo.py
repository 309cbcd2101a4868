r"""Quick start: DisCo on 1,797 real handwritten digits, on any computer, without a download.

    disco-jax demo --workdir runs/quickstart

Trains a MoCo-v2 teacher, then the same narrow backbone twice: with MoCo-v2 alone and with DisCo
from that teacher. As in the papers, the baseline has a narrow head and DisCo a wide one. (A head of
128 served the baseline better than one as wide as its 16 features.) The README reports three seeds:
--config.seeds="(0,1,2)".
"""

from ml_collections import ConfigDict

from disco_jax.configs import disco, knn, linear, moco_v2

TEACHER = dict(backbone="resnet8", width=16, hidden=128)
STUDENT = dict(backbone="resnet14", width=4)


def get_config(arg=None):
    del arg
    config = ConfigDict()
    config.seeds = (0,)
    config.teacher = _digits(moco_v2.get_config("data=digits"))
    config.teacher.student.update(TEACHER)
    config.moco_v2 = _digits(moco_v2.get_config("data=digits"))
    config.moco_v2.student.update(STUDENT, hidden=128)
    config.disco = _digits(disco.get_config("data=digits"))
    config.disco.student.update(STUDENT, hidden=512)
    config.disco.teacher.update(TEACHER)
    config.knn = knn.get_config()
    config.linear = linear.get_config()
    config.linear.learning_rate.base_lr = 3.0  # these features are larger than ImageNet's
    return config


def _digits(config: ConfigDict) -> ConfigDict:
    """Returns `config` with gentle crops and blur for 16 px and the rates of a short run."""
    config.learning_rate.base_lr = 0.12
    config.momentum.ema_rate = 0.99  # 440 steps are too short for 0.999
    config.augment.update(scale=(0.4, 1.0), blur_sigma=(0.1, 0.6))
    config.log.every_steps = 40
    return config
