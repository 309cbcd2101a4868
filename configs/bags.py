r"""Which images a teacher finds alike: the bags of BINGO, or the pseudo labels of K-means.

    disco-jax bags --workdir runs/bags --config.teacher=TEACHER [--config.kind=kmeans]

TEACHER is a run's or an import's directory, or a checkpoint of PyTorch. Writes bags.npz, which
`config.bags.file` of a pretraining run names. BINGO (arXiv:2107.01691) takes the 5 nearest
neighbours of the pooled features; SEED (arXiv:2101.04731) compares with 4k and 16k clusters.
"""

from disco_jax.configs import common


def get_config(arg=None):
    arg = common.parse(arg, data="imagenet2012")
    base = common.pretrain(arg.data)
    config = common.ConfigDict()
    config.data = base.data
    config.teacher = ""
    config.kind = "knn"  # knn | kmeans
    config.output = "features"  # features | embedding
    config.neighbours = 5
    config.clusters = 4096
    config.iterations = 20  # of K-means, at most
    config.seed = 0
    config.size = base.augment.size  # of the images in px; 0: what the teacher was trained on
    config.batch_size = 256  # images encoded at once
    return config
