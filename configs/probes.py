"""Fields of evaluations of a run with their defaults, and the papers' probe of each recipe."""

from ml_collections import ConfigDict

from disco_jax import typed

# Recipe or family of an import (`config.name`) -> protocol of `linear.py` with which its paper
# evaluates it. All others are evaluated as in DisCo and RETRO, whose tables contain MoCo-v2 and the
# combinations with DisCo.
_VIEWS = ("baseline", "crop_scale", "pixel_scale")  # of SSLight's recipes, beside ours
TESTBEDS = {
    **{f"sslight_{m}_{v}": "sslight" for m in ("dino", "moco", "swav") for v in _VIEWS},
    "sslight_moco_two": "sslight",
    # SEED's own ablations.
    **dict.fromkeys(
        ("squared_distance", "online_clusters", "binary_contrast", "pseudo_labels", "seed_moco"),
        "seed",
    ),
    "seed": "seed",
    "seed_cross": "seed",
    "seed_to_large": "seed",
    "seed_small_patch": "seed",
    "swav": "swav",
    "swav_disco": "swav",
    "dino": "dino",
    "dino_disco": "dino",
    "sslight": "sslight",
    "sslight_dino": "sslight",
    "sslight_moco": "sslight",
    "sslight_swav": "sslight",
    "compress": "compress",
    "compress_1q": "compress",
    "compress_2q": "compress",
    "simreg": "compress",
    "bingo": "bingo",
    "ressl": "ressl",
}


def testbed(name: str) -> str:
    """Returns the protocol with which the paper of a recipe (`config.name`) evaluates it."""
    return TESTBEDS.get(name, "disco")


def protocol_for(name: str, backbone: str, self_distills: bool) -> str:
    """Returns the linear probe of a run's paper, e.g. "linear:protocol=disco,student=resnet18".

    Args:
      name: recipe (`config.name`) of a pretraining run, or family of an import.
      backbone: backbone of its student.
      self_distills: whether it has `config.objectives.self_distill` and so an EMA copy to probe.
    """
    protocol = testbed(name)
    arguments = dict(protocol=protocol, student=backbone)
    if protocol == "dino" and not self_distills:
        arguments["network"] = "student"  # an imported network has no EMA copy
    return "linear:" + ",".join(f"{name}={value}" for name, value in arguments.items())


def evaluation(name: str) -> ConfigDict:
    """Returns every field that all evaluations of a run share.

    Args:
      name: stem of the result files in the run's directory.
    """
    from disco_jax.evaluate.probe_settings import EvaluationSettings  # imports JAX

    return ConfigDict(typed.section(EvaluationSettings, name=name))


def classification(name: str) -> ConfigDict:
    """Returns every field of a training with labels: linear probes and fine-tuning.

    The default rate is that of MoCo's linear probe.

    Args:
      name: see `evaluation`.
    """
    from disco_jax.evaluate.probe_settings import ProbeSettings  # imports JAX

    config = ConfigDict(
        typed.section(
            ProbeSettings,
            name=name,
            optimizer=dict(name="sgd", momentum=0.9, weight_decay=0.0, nesterov=False),
        )
    )
    config.learning_rate.update(base_lr=30.0, decay="steps", milestones=(60, 80))
    return config


def base_rate(backbone: str) -> float:
    """Returns the rate of DisCo's, SEED's and RETRO's probes of a backbone.

    Without a name it is 0: the evaluation then takes that of the run's backbone.
    """
    if not backbone:
        return 0.0
    from disco_jax import models  # imports JAX

    return models.probe_rate(backbone)
