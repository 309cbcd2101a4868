r"""Supervised training on ImageNet-1k, the upper bound in the papers' tables.

    disco-jax pretrain --workdir gs://BUCKET/supervised \
        --config configs/supervised.py:student=resnet18

Top-1: MobileNetV2 71.9, ResNet-18 69.8, ResNet-34 73.3, ResNet-50 76.1 (SSLight, Tables 1 and 4),
which are the values of torchvision's weights; ours not measured yet. These are torchvision's
settings. `linear` scores the features with a classifier of its own.

DisCo's and SEED's Table 1 quote other trainings: ResNets with ten crops a test image
(arXiv:1512.03385, Table 2: 72.1 and 75.0), EfficientNets (arXiv:1905.11946: 77.1, 79.2) and
MobileNetV3 (arXiv:1905.02244: 75.2), whose augmentation, optimizer and weight averages this package
does not have; those networks train here as ResNets do.
"""

from disco_jax.configs import common, data, small


def get_config(arg=None):
    arg = common.parse(arg, student="resnet18", data="imagenet2012", smoke=False)
    config = common.pretrain("supervised", arg.data)
    # torchvision, references/classification: 8 devices of 32 images, 90 epochs.
    config.total_epochs, config.batch_size = 90, 256
    config.optimizer.update(name="sgd", momentum=0.9, weight_decay=1e-4)
    config.learning_rate.update(base_lr=0.1, decay="steps", every="epoch", warmup_epochs=0)
    config.learning_rate.update(milestones=(30, 60), factor=0.1)
    if arg.student == "mobilenetv2":
        config.total_epochs = 300
        config.optimizer.weight_decay = 4e-5
        config.learning_rate.update(base_lr=0.045, milestones=tuple(range(1, 300)), factor=0.98)
    # One view: a random crop of 8 to 100 % of the area, flipped or not.
    config.views = 1
    common.augment(config, "linear")
    # The classifier: one linear layer on the features.
    classes = data.properties(arg.data)["classes"]
    config.student.update(backbone=arg.student, head="mlp", hidden=0, dim=classes, norm="local")
    config.objectives.supervised.update(weight=1.0, view=0)
    return small.shrink(config, arg)
