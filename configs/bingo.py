r"""BINGO on ImageNet-1k: images that the teacher finds similar form bags (arXiv:2107.01691).

    disco-jax bags --workdir gs://BUCKET/bags --config.teacher=gs://BUCKET/moco_v2
    disco-jax pretrain --workdir gs://BUCKET/bingo \
        --config configs/bingo.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2 --config.bags.file=gs://BUCKET/bags/bags.npz

Linear top-1, R-50 -> R-18: 61.4 (RETRO, Table 6); ours not measured yet. Bags are the 5 nearest
neighbours, or K-means clusters with `disco-jax bags --config.kind=kmeans`.
"""

from disco_jax.configs import common, small


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", smoke=False
    )
    config = common.pretrain("bingo", arg.data)
    efficientnet = common.family(arg.student) == "efficientnet"  # has its own settings in scripts/
    # Official code (main_moco.py, scripts/).
    config.total_epochs, config.batch_size = 200, 256
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=4e-5 if efficientnet else 1e-4)
    config.learning_rate.update(base_lr=0.03, decay="cosine", every="epoch", warmup_epochs=0)
    # Two views of the image and two of another image of its bag.
    config.views = 4
    common.augment(config, "moco_v2")
    config.bags.sampling = "images"
    # moco/builder.py: no EMA copy. The teacher encodes the keys, on shuffled batch statistics.
    config.student.update(backbone=arg.student, head="mlp", hidden=2048, dim=128, norm="local")
    config.teacher.update(backbone=arg.teacher, norm="shuffle")
    # Epochs 0 to 10 contrast with the image's own key only; the third query is a CutMix, whose box
    # each of 8 devices draws for its 32 images.
    config.objectives.bags.update(weight=1.0, temperature=0.12 if efficientnet else 0.2)
    config.objectives.bags.update(queue_size=65_536, queue_init="random")
    config.objectives.bags.update(cutmix=True, cutmix_group=32, own_epochs=11)
    return small.shrink(config, arg)
