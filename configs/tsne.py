r"""t-SNE of ten classes for one run or several (DisCo, figure 8).

    disco-jax tsne --workdir TEACHER --config.beside="('BASELINE','STUDENT')" \
        --config.titles="('teacher','MoCo-v2','DisCo')"

Needs scikit-learn: pip install "disco-jax[tsne]". All runs encode the first run's images.
"""

from disco_jax.configs import common, probes


def get_config(arg=None):
    common.parse(arg)
    config = probes.evaluation("tsne")
    config.beside = ()  # directories of the other runs
    config.titles = ()  # titles of the plots; (): the names of the directories
    config.split = ""  # "": the test images
    config.num_classes = 10
    config.classes = ()  # class indices; (): the first ones
    config.names = ()  # class names by class index
    config.images_per_class = 100
    config.perplexity = 30.0
    config.seed = 0
    return config
