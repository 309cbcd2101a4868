"""Differences in grey levels (of 255) between ways to compute the same views.

    python benchmarks/pixels.py --data DIR [--name imagenet2012] [--images 192]

Prints the mean absolute difference, and its 95th percentile, of

  antialias    crops resized with "area" and "none" from those with "exact", which equals Pillow
  jitter       images after colour jitter in two random orders of its four operations, with the
               same factors: torchvision draws an order for each image, this package one for a batch

on photographs of a prepared TFDS data set.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from disco_jax.data import decode, presets, sources, views
from disco_jax.ops import augment

# Size in px, scale and filter of the crops: MoCo-v2's and SwAV's global and local ones, DINO's,
# SSLight's local ones, and crops that shrink a photograph to a small image.
CROPS = (
    (224, (0.2, 1.0), "bilinear"),
    (224, (0.14, 1.0), "bilinear"),
    (96, (0.05, 0.14), "bilinear"),
    (224, (0.4, 1.0), "bicubic"),
    (96, (0.05, 0.4), "bicubic"),
    (128, (0.05, 0.3), "bicubic"),
    (96, (0.2, 1.0), "bilinear"),
    (32, (0.2, 1.0), "bilinear"),
)
ORDERS = 8  # random pairs of orders


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="directory of prepared TFDS data sets")
    parser.add_argument("--name", default="imagenet2012")
    parser.add_argument("--images", type=int, default=192)
    args = parser.parse_args()
    source = sources.TfdsSource(args.name, args.data)
    stored = itertools.islice(source.iter_images("train"), args.images)
    files = [file for _, file, _ in stored]
    sides = np.array([decode.decode(file).shape[:2] for file in files])
    print(f"{len(files)} images of {sides.mean(0)[1]:.0f} x {sides.mean(0)[0]:.0f} px on average")
    for crop in CROPS:
        exact = cropped(files, *crop, "exact")
        for antialias in ("area", "none"):
            show(f"{crop}, {antialias}", cropped(files, *crop, antialias) - exact)
    show("order of the jitter", jittered(cropped(files, 96, (0.2, 1.0), "bilinear", "exact")))


def cropped(files, size, scale, interpolation, antialias):
    """Returns one random resized crop of each image, i16[N, size, size, 3]; the same boxes."""
    settings = {**presets.PRESETS["moco_v2"], "size": size, "scale": scale}
    settings |= {"interpolation": interpolation, "antialias": antialias}
    views_of = decode.crops_of(files, {0: views.build(settings, 1).crops[0]}, (0, 0, 0), 0)
    return np.stack([crop for (crop,) in views_of]).astype(np.int16)


def jittered(images):
    """Returns the differences between pairs of orders of MoCo-v2's jitter, f32[P, N, S, S, 3]."""
    rng = np.random.default_rng(0)
    strengths = np.array([0.4, 0.4, 0.4, 0.1])
    factors = rng.uniform(-strengths, strengths, (len(images), 4)) + np.array([1, 1, 1, 0])
    factors = jnp.asarray(factors, jnp.float32)
    pixels = jnp.asarray(images, jnp.float32) / 255
    apply = jax.jit(lambda order: 255 * augment.jitter(pixels, factors, order))
    draw = [jnp.asarray(rng.permutation(4), jnp.int32) for _ in range(2 * ORDERS)]
    return np.stack([apply(a) - apply(b) for a, b in zip(draw[::2], draw[1::2], strict=True)])


def show(name, difference):
    size = np.abs(difference)
    print(f"{name:34} mean {size.mean():.2f}, 95th percentile {np.percentile(size, 95):.1f}")


if __name__ == "__main__":
    main()
