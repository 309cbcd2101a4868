r"""Groups of similar images according to a teacher: BINGO's bags, or K-means pseudo labels.

    disco-jax bags --workdir runs/bags --config.teacher=TEACHER [--config.kind=kmeans]

TEACHER is the directory of a run or of an import, or a PyTorch checkpoint. Writes bags.npz, which
`config.bags.file` of a pretraining run names. BINGO (arXiv:2107.01691) takes the 5 nearest
neighbours of the pooled features; SEED (arXiv:2101.04731) compares with 4k and 16k clusters.
"""

from ml_collections import ConfigDict

from disco_jax.configs import common


def get_config(arg=None):
    arg = common.parse(arg, data="imagenet2012")
    base = common.pretrain(dataset=arg.data)
    config = ConfigDict()
    config.data = base.data
    config.teacher = ""
    config.kind = "knn"  # knn | kmeans
    config.output = "features"  # features | embedding
    config.neighbours = 5
    config.clusters = 4096
    config.iterations = 20  # most iterations of K-means
    config.seed = 0
    config.size = base.augment.size  # image size in px; 0: the size the teacher was trained on
    config.batch_size = 256  # images encoded at once
    return config
