r"""Linear evaluation of a run on another data set, as the papers transfer to CIFAR.

    disco-jax transfer --workdir RUN --config configs/transfer.py:data=cifar10
    disco-jax transfer --workdir RUN --config configs/transfer.py:protocol=seed,data=sun397
    disco-jax transfer --workdir RUN --config configs/transfer.py:data=flowers \
        --config.data.source=folder --config.data.dir=flowers/

`data` is a prepared TFDS data set; if `data.dir` is a folder or an .npz, it only names the results.
`sun397` is the data set's official split 1, TFDS's `sun397/standard-part1-120k`. Protocols: `disco`
(also RETRO's) has 224 px bicubic, random crops and flips, rate 3, 100 epochs; `disco_code` has 200
epochs without decay (disagreement D8); `seed` extracts features once and trains 120 epochs at rate
0.001. `seed_search` searches that rate as SEED did, by 10-fold cross-validation on the training
images, on SUN397 with a fifth of them (10 images a class); SEED does not give the rates it tried.
"""

from disco_jax.configs import common, probes
from disco_jax.errors import unknown

PROTOCOLS = {
    "disco": {},
    "disco_code": {"total_epochs": 200, "learning_rate.decay": "constant"},
    "seed": {
        "augment": "none",
        "total_epochs": 120,
        "learning_rate.base_lr": 0.001,
        "learning_rate.decay": "constant",
    },
}
PROTOCOLS["seed_search"] = {
    **PROTOCOLS["seed"],
    "grid.rates": tuple(10.0 ** (i / 2) for i in range(-8, 1)),
    "grid.weight_decays": (0.0,),
    "grid.folds": 10,
}
# Data set -> TFDS name of the split that SEED takes.
OFFICIAL = {"sun397": "sun397/standard-part1-120k"}


def get_config(arg=None):
    arg = common.parse(arg, protocol="disco", data="cifar10")
    if arg.protocol not in PROTOCOLS:
        raise unknown("The recipe's argument protocol", arg.protocol, PROTOCOLS)
    config = probes.classification(f"transfer_{arg.protocol}_{arg.data.replace('/', '_')}")
    config.protocol = f"transfer:{arg.protocol}"
    name = OFFICIAL.get(arg.data, arg.data)
    config.data.update(name=name, size=224, eval_resize=224, interpolation="bicubic")
    config.learning_rate.base_lr = 3.0
    config.update_from_flattened_dict(PROTOCOLS[arg.protocol])
    if arg.data == "sun397":
        config.grid.update(held_out_percent=20.0, folds=0)
    return config
