r"""Linear evaluation of a run on another data set, as the papers transfer to CIFAR.

    disco-jax transfer --workdir RUN --config configs/transfer.py:data=cifar10
    disco-jax transfer --workdir RUN --config configs/transfer.py:protocol=seed,data=sun397
    disco-jax transfer --workdir RUN --config configs/transfer.py:data=flowers \
        --config.data.source=folder --config.data.dir=flowers/

`data` names a prepared TFDS data set, or the results where `data.dir` holds a folder or an .npz.
`disco`, RETRO's too: 224 px bicubic, random crops and flips, rate 3, 100 epochs. `disco_code`: 200
epochs without decay (disagreement D8). `seed`: features extracted once, rate 0.001, 120 epochs.
"""

from disco_jax.configs import common
from disco_jax.errors import unknown

PROTOCOLS = {
    "disco": {},
    "disco_code": {"total_epochs": 200, "learning_rate.decay": "constant"},
    "seed": {
        "augment": "none",
        "total_epochs": 120,
        "learning_rate.per_256": 0.001,
        "learning_rate.decay": "constant",
    },
}


def get_config(arg=None):
    arg = common.parse(arg, protocol="disco", data="cifar10")
    if arg.protocol not in PROTOCOLS:
        raise unknown("The recipe's argument protocol", arg.protocol, PROTOCOLS)
    config = common.classification(f"transfer_{arg.protocol}_{arg.data.replace('/', '_')}")
    config.data.update(name=arg.data, size=224, eval_resize=224, interpolation="bicubic")
    config.learning_rate.per_256 = 3.0
    config.update_from_flattened_dict(PROTOCOLS[arg.protocol])
    return config
