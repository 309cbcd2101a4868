r"""t-SNE of ten classes for one or several runs side by side (DisCo, figure 8).

    disco-jax tsne --workdir TEACHER --config.beside="('BASELINE','STUDENT')" \
        --config.titles="('teacher','MoCo-v2','DisCo')"

Needs scikit-learn: pip install "disco-jax[tsne]". All runs see the images of the first one's data.
"""

from disco_jax.configs import common


def get_config(arg=None):
    common.parse(arg)
    config = common.evaluation("tsne")
    config.beside = ()  # directories of further runs
    config.titles = ()  # above the pictures; (): the names of the directories
    config.split = ""  # "": the test images
    config.num_classes = 10
    config.classes = ()  # their numbers; (): the first ones
    config.names = ()  # of the classes, in the order of their numbers
    config.images_per_class = 100
    config.perplexity = 30.0
    config.seed = 0
    return config
