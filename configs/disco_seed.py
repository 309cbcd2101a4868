r"""DisCo and SEED together, optionally with RKD: any weighted sum of objectives is a config.

    disco-jax pretrain --workdir gs://BUCKET/disco_seed \
        --config configs/disco_seed.py:student=resnet18,teacher=resnet50 \
        --config.teacher.weights=gs://BUCKET/moco_v2

No paper has this sum; ours not measured yet. `--config.objectives.distill.weight=0` leaves SEED +
MoCo-v2 without DisCo's distance, for which SEED lists 57.6 (R-50 -> R-18).
"""

from disco_jax.configs import common, small


def get_config(arg=None):
    arg = common.parse(
        arg, student="resnet18", teacher="resnet50", data="imagenet2012", rkd=False, smoke=False
    )
    config = common.pretrain("disco_seed_rkd" if arg.rkd else "disco_seed", arg.data)
    # Networks and training as in disco.py, also where SEED differs (S2, S3).
    config.total_epochs, config.batch_size = 200, 256
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=1e-4)
    config.learning_rate.update(base_lr=0.03, decay="cosine", every="epoch", warmup_epochs=0)
    config.views = 2
    common.augment(config, "moco_v2")
    config.student.update(backbone=arg.student, head="mlp", hidden=2048, dim=128, norm="local")
    config.momentum.update(ema_rate=0.999, norm="shuffle")
    config.teacher.update(backbone=arg.teacher, hidden=-1, dim=128, norm="local")
    # DisCo (disagreements D1, D3).
    config.objectives.contrast.update(weight=1.0, pairs=((0, 1),), temperature=0.2)
    config.objectives.contrast.update(queue_size=65_536, queue_init="teacher")
    config.objectives.distill.update(weight=32.0, views=(0, 1), reduction="mean")
    # SEED on view 0, with its paper's temperatures (S1).
    config.objectives.similarity.update(weight=1.0, groups=(((0, 0),),), queue_size=65_536)
    config.objectives.similarity.update(student_temperature=0.2, teacher_temperature=0.01)
    # RKD on view 0, among all images of a device.
    config.objectives.relations.update(weight=1.0 if arg.rkd else 0.0, distance=1.0, angle=1.0)
    return small.shrink(config, arg)
