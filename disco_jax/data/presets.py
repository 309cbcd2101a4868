"""Named augmentation presets as plain settings, implemented in `views.py`.

Has no imports, so that configs, the help page and `disco-jax list` load it at no cost.
Sources: the official releases of MoCo (`main_moco.py`), SwAV (`multicropdataset.py`), SEED
(`tools/utils.py`), DINO (`main_dino.py`) and SimReg.
"""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# SwAV's official code uses a different standard deviation.
SWAV_STD = (0.228, 0.224, 0.225)

# `order` lists the photometric operations in the order of application.
_PLAIN = dict(
    size=224,
    scale=(0.08, 1.0),  # fraction of the image area covered by a crop
    ratio=(3 / 4, 4 / 3),  # width / height of a crop
    interpolation="bilinear",
    antialias="area",  # exact | area | none, see docs/data.md
    order=("flip",),
    flip_prob=0.5,
    jitter=(0.0, 0.0, 0.0, 0.0),  # brightness, contrast, saturation, hue
    jitter_prob=0.0,
    grey_prob=0.0,
    blur_prob=0.0,  # every *_prob except flip_prob is a number, or one number per global view
    blur_sigma=(0.1, 2.0),  # in pixels
    solarize_prob=0.0,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)

_MOCO_V2 = {
    **_PLAIN,
    "scale": (0.2, 1.0),
    "order": ("jitter", "grey", "blur", "flip"),
    "jitter": (0.4, 0.4, 0.4, 0.1),
    "jitter_prob": 0.8,
    "grey_prob": 0.2,
    "blur_prob": 0.5,
}

PRESETS = {
    "weak": _PLAIN,
    "weak02": {**_PLAIN, "scale": (0.2, 1.0)},  # SimReg; ReSSL's key view
    "linear": _PLAIN,  # training crops of linear probes
    "moco_v1": {
        **_PLAIN,
        "scale": (0.2, 1.0),
        "order": ("grey", "jitter", "flip"),
        "jitter": (0.4, 0.4, 0.4, 0.4),
        "jitter_prob": 1.0,
        "grey_prob": 0.2,
    },
    "moco_v2": _MOCO_V2,
    "swav": {
        **_MOCO_V2,
        "scale": (0.14, 1.0),
        "order": ("flip", "jitter", "grey", "blur"),
        "jitter": (0.8, 0.8, 0.8, 0.2),
        "std": SWAV_STD,
    },
    "seed_swav": {**_MOCO_V2, "scale": (0.14, 1.0)},  # SEED: SwAV's crops with MoCo's colours
    "dino": {
        **_MOCO_V2,
        "scale": (0.4, 1.0),
        "interpolation": "bicubic",
        "order": ("flip", "jitter", "grey", "blur", "solarize"),
        "jitter": (0.4, 0.4, 0.2, 0.1),
        "blur_prob": (1.0, 0.1),
        "solarize_prob": (0.0, 0.2),
    },
}

# Settings in which the smaller local views of multi-crop recipes differ from the global views.
_LOCAL = dict(count=6, size=96, scale=(0.05, 0.14), blur_prob=0.5, solarize_prob=0.0)
LOCALS = {
    "swav": _LOCAL,
    "seed_swav": _LOCAL,
    "dino": {**_LOCAL, "count": 8, "scale": (0.05, 0.4)},
}
NO_LOCALS = {**_LOCAL, "count": 0}
