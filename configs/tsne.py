r"""t-SNE of ten classes for one run or several (DisCo, figure 8).

    disco-jax tsne --workdir TEACHER --config.beside="('BASELINE','STUDENT')" \
        --config.titles="('teacher','MoCo-v2','DisCo')"

Needs scikit-learn: pip install "disco-jax[tsne]". All runs encode the first run's images. The paper
draws 10 random classes; `tsne:protocol=disco` has those of its official code, the first 50
validation images of classes 5 to 14. Distances are Euclidean there, as scikit-learn's default.
"""

from disco_jax.configs import common, probes
from disco_jax.errors import unknown

PROTOCOLS = {"": {}, "disco": dict(classes=tuple(range(5, 15)), images_per_class=50)}


def get_config(arg=None):
    arg = common.parse(arg, protocol="")
    if arg.protocol not in PROTOCOLS:
        raise unknown("The recipe's argument protocol", arg.protocol, PROTOCOLS)
    config = probes.evaluation("tsne")
    config.beside = ()  # directories of the other runs
    config.titles = ()  # titles of the plots; (): the names of the directories
    config.split = ""  # "": the test images
    config.num_classes = 10
    config.classes = ()  # class indices; (): the first ones
    config.names = ()  # class names by class index
    config.images_per_class = 100
    config.perplexity = 30.0
    config.metric = "euclidean"  # distance of features: euclidean (scikit-learn's default) | cosine
    config.seed = 0
    config.update(PROTOCOLS[arg.protocol])
    return config
