r"""What students cost: parameters, multiply-adds and CPU latency, beside their accuracy.

    disco-jax cost --workdir OUT --config.students="('resnet18','mobilenetv3_large')"
    disco-jax cost --workdir OUT --config.runs="('RUN','OTHER_RUN')"

Latency is that of one image on this machine's CPU. The figure (DisCo, figure 1) draws the top-1 of
`RESULT.json` in every run's directory against its parameters.
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    del arg
    config = ConfigDict()
    config.name = "cost"
    config.students = ()  # names of networks
    config.size = 224  # px, of those
    config.runs = ()  # directories
    config.result = "linear"  # whose top-1 is drawn
    config.repeats = 30  # timed passes
    return config
