r"""Linear evaluation of a run on another data set, as the papers transfer to CIFAR.

    disco-jax transfer --workdir RUN --config configs/transfer.py:data=cifar10
    disco-jax transfer --workdir RUN --config configs/transfer.py:protocol=seed,data=sun397
    disco-jax transfer --workdir RUN --config configs/transfer.py:data=flowers \
        --config.data.source=folder --config.data.dir=flowers/

`data` is a prepared TFDS data set; if `data.dir` is a folder or an .npz, it only names the results.
Protocols: `disco` (also RETRO's) has 224 px bicubic, random crops and flips, rate 3, 100 epochs;
`disco_code` has 200 epochs without decay (disagreement D8); `seed` extracts features once and
trains 120 epochs at rate 0.001.
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


def get_config(arg=None):
    arg = common.parse(arg, protocol="disco", data="cifar10")
    if arg.protocol not in PROTOCOLS:
        raise unknown("The recipe's argument protocol", arg.protocol, PROTOCOLS)
    config = probes.classification(f"transfer_{arg.protocol}_{arg.data.replace('/', '_')}")
    config.protocol = arg.protocol
    config.data.update(name=arg.data, size=224, eval_resize=224, interpolation="bicubic")
    config.learning_rate.base_lr = 3.0
    config.update_from_flattened_dict(PROTOCOLS[arg.protocol])
    return config
