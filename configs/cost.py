r"""Parameters, multiply-adds and CPU latency of students beside their accuracy.

    disco-jax cost --workdir OUT --config.students="('resnet18','mobilenetv3_large')"
    disco-jax cost --workdir OUT --config.runs="('RUN','OTHER_RUN')"

Latency is measured for one image on this machine's CPU. The figure (DisCo, figure 1) plots the
top-1 of `RESULT.json` in each run's directory against the number of parameters.
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    del arg
    config = ConfigDict()
    config.name = "cost"
    config.students = ()  # backbones
    config.size = 224  # image size in px for `students`
    config.runs = ()  # directories of runs
    config.result = "linear"  # the evaluation whose top-1 is plotted
    config.repeats = 30  # timed forward passes
    return config
