r"""Few-shot evaluation of a run: ridge regression on 5, 10 and 25 images of every class.

    disco-jax fewshot --workdir RUN

The regression has a closed form (arXiv:2010.11929, section 4.1); leave-one-out on the same images
selects its strength. Reports mean and standard deviation over `seeds`, which draw the images.
"""

from disco_jax.configs import common, probes


def get_config(arg=None):
    common.parse(arg)
    config = probes.evaluation("fewshot")
    config.shots = (5, 10, 25)
    config.seeds = (0, 1, 2)
    return config
