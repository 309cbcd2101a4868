r"""DisCo and SEED together, with RKD if asked for: any sum of objectives is a config.

    disco-jax pretrain --workdir gs://BUCKET/disco_seed \
        --config configs/disco_seed.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

No paper lists it; ours not measured yet. SEED + MoCo-v2 without DisCo's distance, which SEED lists
with 57.6 for R-50 -> R-18: `--config.objectives.distill.weight=0`.
"""

from disco_jax.configs import common, disco


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", rkd=False, smoke=False
    )
    config = disco.get_config(common.join(arg, without="rkd"))
    config.name = "disco_seed_rkd" if arg.rkd else "disco_seed"
    config.objectives.similarity.weight = 1.0
    config.objectives.relations.weight = 1.0 if arg.rkd else 0.0
    return config
