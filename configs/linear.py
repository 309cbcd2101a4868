r"""Linear probe of a run on frozen features, the papers' protocol.

    disco-jax linear --workdir RUN [--config.learning_rate.per_256=3.0]

MoCo, DisCo and RETRO on ImageNet: SGD, batch 256, 100 epochs, rate 30 for ResNets and 3 for
EfficientNets and MobileNets, divided by 10 at epochs 60 and 80, no weight decay. The features are
extracted once from the centre crop, without augmentation.
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    del arg
    config = ConfigDict()
    config.network = "student"  # student | momentum
    config.seed = 0
    config.batch_size = 256
    config.total_epochs = 100
    config.optimizer = dict(name="sgd", momentum=0.9, weight_decay=0.0)
    config.learning_rate = dict(
        per_256=30.0,
        decay="steps",
        every="epoch",
        milestones=(60, 80),
        factor=0.1,
        warmup_epochs=0,
        warmup_from=0.0,
    )
    config.log_every_epochs = 10
    config.extract_batch_size = 256  # images encoded at once
    return config
