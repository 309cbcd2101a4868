r"""Information plane of a run while a classifier is trained on it (DisCo, figure 7).

    disco-jax plane --workdir RUN --config configs/plane.py:data=cifar10 \
        --config.information_plane.beside="('OTHER_RUN',)"
    disco-jax plane --workdir RUN --config configs/plane.py:protocol=code,data=cifar10

T is the classifier's output, with probabilities in 30 bins. I(X;T) and I(T;Y) are estimated along
the training. The figure draws the path from the transition, where I(X;T) is highest, to the end,
for this run and for those in `beside`.

The paper does not state the training (disagreement D16). `paper` fine-tunes all layers for 20
epochs and estimates `points` times on the test images. `code` is that of the official code
(cifar_main_lincls.py): a linear probe of 200 epochs at rate 3, estimated on the first 1000 training
images after each step of the first epoch and after each later epoch.
"""

from disco_jax import typed
from disco_jax.configs import common, finetune, transfer
from disco_jax.errors import unknown

PROTOCOLS = {
    "paper": {},
    "code": dict(split="train", images=1000, points=0, first_steps=True),
}


def get_config(arg=None):
    from disco_jax.evaluate.probe_settings import InformationPlaneSettings  # imports JAX

    arg = common.parse(arg, protocol="paper", data="")
    if arg.protocol not in PROTOCOLS:
        raise unknown("The recipe's argument protocol", arg.protocol, PROTOCOLS)
    config = finetune.get_config()
    if arg.protocol == "code":
        own_data = config.data
        config = transfer.get_config("protocol=disco_code")
        config.data = own_data
    config.name = "plane" if arg.protocol == "paper" else f"plane_{arg.protocol}"
    config.protocol = f"plane:{arg.protocol}"
    if arg.data:
        config.data.update(name=arg.data, size=224, eval_resize=224, interpolation="bicubic")
    config.information_plane = typed.section(InformationPlaneSettings)
    config.information_plane.update(PROTOCOLS[arg.protocol])
    return config
