r"""k-nearest-neighbour evaluation of a run.

    disco-jax knn --workdir RUN [--config.k=20]
    disco-jax knn --workdir RUN --config configs/knn.py:protocol=seed

Protocols: `dino`, the default, weights the votes of 20 neighbours by exp(cosine / 0.07), on pooled
features (arXiv:2104.14294, also SSLight's); `seed` takes the majority of 10 neighbours, on the
embedding (arXiv:2101.04731); `compress` takes the nearest neighbour, on the features (also
SimReg's).
"""

from disco_jax.configs import common, probes
from disco_jax.errors import unknown

PROTOCOLS = {
    "dino": {},
    "seed": dict(output="embedding", vote="majority", k=10),
    "compress": dict(vote="majority", k=1),
}


def get_config(arg=None):
    arg = common.parse(arg, protocol="dino")
    if arg.protocol not in PROTOCOLS:
        raise unknown("The recipe's argument protocol", arg.protocol, PROTOCOLS)
    config = probes.evaluation("knn" if arg.protocol == "dino" else f"knn_{arg.protocol}")
    config.vote = "weighted"  # weighted | majority
    config.k = 20
    config.temperature = 0.07
    config.update(PROTOCOLS[arg.protocol])
    return config
