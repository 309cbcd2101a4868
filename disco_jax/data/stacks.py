"""Named augmentation stacks as plain settings; what each does is in `views.py`.

Kept free of imports so that configs, the help page and `disco-jax list` load it at no cost.
Sources: MoCo-v2 (arXiv:2003.04297) and the official release's `main_moco.py`.
"""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# `order` lists the photometric operations in the order in which they act.
_PLAIN = dict(
    size=224,
    scale=(0.08, 1.0),  # share of the image's area that a crop covers
    ratio=(3 / 4, 4 / 3),  # width over height of a crop
    interpolation="bilinear",
    antialias=True,
    order=("flip",),
    flip_prob=0.5,
    jitter=(0.0, 0.0, 0.0, 0.0),  # brightness, contrast, saturation, hue
    jitter_prob=0.0,
    grey_prob=0.0,
    blur_prob=0.0,
    blur_sigma=(0.1, 2.0),  # in pixels
    solarize_prob=0.0,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)

STACKS = {
    "weak": _PLAIN,
    "moco_v2": {
        **_PLAIN,
        "scale": (0.2, 1.0),
        "order": ("jitter", "grey", "blur", "flip"),
        "jitter": (0.4, 0.4, 0.4, 0.1),
        "jitter_prob": 0.8,
        "grey_prob": 0.2,
        "blur_prob": 0.5,
    },
}
