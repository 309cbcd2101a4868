r"""Few-shot evaluation of a run: ridge regression on 5, 10 and 25 images of every class.

    disco-jax fewshot --workdir RUN

In closed form (arXiv:2010.11929, section 4.1), the strength chosen by leave-one-out on those very
images. Mean and standard deviation over `seeds`, each of which chooses other images.
"""

from disco_jax.configs import common


def get_config(arg=None):
    common.parse(arg)
    config = common.evaluation("fewshot")
    config.shots = (5, 10, 25)
    config.seeds = (0, 1, 2)
    return config
