r"""k-nearest-neighbour evaluation of a run.

    disco-jax knn --workdir RUN [--config.k=20]

`weighted` votes on the pooled features as DINO does (arXiv:2104.14294, k = 20, temperature 0.07);
`majority` is the plain vote of SEED (arXiv:2101.04731, k = 10) on the embedding.
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    del arg
    config = ConfigDict()
    config.network = "student"  # student | momentum
    config.output = "features"  # features | embedding
    config.vote = "weighted"  # weighted | majority
    config.k = 20
    config.temperature = 0.07
    config.batch_size = 256  # images encoded at once
    return config
