r"""The information plane of a run while it is fine-tuned (DisCo, figure 7).

    disco-jax plane --workdir RUN --config configs/plane.py:data=cifar10 \
        --config.plane.beside="('OTHER_RUN',)"

T is the output of the classifier, its probabilities cut into 30 bins; I(X;T) and I(T;Y) are taken
`points` times along the fine-tuning of all layers. The figure draws the way from the transition,
where I(X;T) is highest, to the end, of this run and of those of `beside`.
"""

from disco_jax.configs import common, finetune


def get_config(arg=None):
    arg = common.parse(arg, data="")
    config = finetune.get_config()
    config.name = "plane"
    if arg.data:
        config.data.update(name=arg.data, size=224, eval_resize=224, interpolation="bicubic")
    config.plane = dict(
        split="",  # whose images are looked at; "": those of the test
        images=0,  # no more than so many of them; 0: all
        points=40,  # looks along the training
        bins=30,
        grouping="rows",  # rows | official: with the slip of the estimator's code
        beside=(),  # directories of runs that have been followed before
    )
    return config
