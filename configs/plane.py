r"""Information plane of a run during fine-tuning (DisCo, figure 7).

    disco-jax plane --workdir RUN --config configs/plane.py:data=cifar10 \
        --config.information_plane.beside="('OTHER_RUN',)"

T is the classifier's output, with probabilities in 30 bins. I(X;T) and I(T;Y) are estimated
`points` times during the fine-tuning of all layers. The figure draws the path from the transition,
where I(X;T) is highest, to the end, for this run and for those in `beside`.
"""

from disco_jax.configs import common, finetune


def get_config(arg=None):
    arg = common.parse(arg, data="")
    config = finetune.get_config()
    config.name = "plane"
    if arg.data:
        config.data.update(name=arg.data, size=224, eval_resize=224, interpolation="bicubic")
    config.information_plane = dict(
        split="",  # the split whose images are used; "": the test images
        images=0,  # largest number of images; 0: all
        points=40,  # estimates during the training
        bins=30,
        grouping="rows",  # rows | official (reproduces an error in the estimator's code)
        beside=(),  # directories of runs that have a plane already
    )
    return config
