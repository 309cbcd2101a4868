"""Images a second of the input pipeline, against a torchvision-style loader, in one run.

    python benchmarks/input.py [--images 200] [--seconds 4] [--data DIR --name imagenet2012]

Everything runs on one core, in turns, for three rounds; the medians and their ratios are printed as
a table and as one line of JSON. Without --data the pictures are photographs' stand-ins: smooth
noise of 500 x 375 px, saved as JPEG of quality 92.

  bare decode        Pillow decodes the whole JPEG, nothing else
  two-crop Pillow    what torchvision's MoCo-v2 loader does on PIL images: decode, two random
                     resized crops, colour jitter, grey, blur, flip, to float, normalise
  folder             `data.folders.FolderSource`: two 224 px crops, uint8; the rest is the step's
  tfds               `data.sources.TfdsSource`, the same, by TensorFlow
  tfds, plain        the same with augment.antialias=False: other pixels, see the table's text
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import pathlib
import statistics
import tempfile
import time

os.environ["OMP_NUM_THREADS"] = "1"
with contextlib.suppress(AttributeError):  # Linux alone pins a process to a core
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from disco_jax.data import folders, sources, stacks, views
from disco_jax.data.base import Position
from disco_jax.data.crops import boxes

SIZE, BATCH = 224, 32
RECIPE = views.build(stacks.STACKS["moco_v2"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each loader in each round")
    parser.add_argument("--data", default="", help="where prepared TFDS data sets lie")
    parser.add_argument("--name", default="imagenet2012")
    values = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        encoded = photographs(values) if values.data else made_up(values.images)
        for i, picture in enumerate(encoded):
            pathlib.Path(folder, f"{i:05}.jpg").write_bytes(picture)
        loaders = {
            "bare decode": lambda: bare(encoded),
            "two-crop Pillow": lambda: two_crops(encoded),
            "folder": lambda: crops(folders.FolderSource(folder), "train"),
        }
        if values.data:
            opened = sources.TfdsSource(values.name, values.data)
            split = max(opened.splits, key=opened.count)
            plain = views.build({**stacks.STACKS["moco_v2"], "antialias": False})
            loaders["tfds"] = lambda: crops(opened, split)
            loaders["tfds, plain"] = lambda: crops(opened, split, plain)
        report(loaders, values.seconds)


def photographs(values):
    """The JPEGs of a prepared data set, as they lie in it."""
    opened = sources.TfdsSource(values.name, values.data)
    split = max(opened.splits, key=opened.count)
    _, tfds = sources.tensorflow()
    builder = tfds.builder_from_directory(str(sources.find(values.name, values.data)))
    decoders = {"image": tfds.decode.SkipDecoding()}
    records = builder.as_dataset(split=split, decoders=decoders).take(values.images)
    return [record["image"] for record in records.as_numpy_iterator()]


def made_up(count):
    """Smooth noise with some grain, as heavy to decode as photographs of 500 x 375 px."""
    rng, pictures = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        image = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        image = np.clip(image + rng.integers(-12, 13, image.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=92)
        pictures.append(file.getvalue())
    return pictures


def bare(encoded):
    for picture in itertools.cycle(encoded):
        with Image.open(io.BytesIO(picture)) as opened:
            opened.convert("RGB").load()
        yield 1


def two_crops(encoded):
    """MoCo-v2's two views on PIL images, one picture after the other."""
    rng = np.random.default_rng(0)
    for picture in itertools.cycle(encoded):
        with Image.open(io.BytesIO(picture)) as opened:
            image = opened.convert("RGB")
        for _ in range(2):
            augmented(rng, image)
        yield 1


def augmented(rng, image):
    crop = RECIPE.crops[0]
    sides = np.array([image.height]), np.array([image.width])
    top, left, height, width = map(
        int, boxes(rng.random((1, 12, 2)), *sides, crop.scale, crop.ratio)[0]
    )
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    if rng.random() < 0.8:
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color, None)
        for kind in rng.permutation(np.array(enhancers, object)):
            image = kind(image).enhance(rng.uniform(0.6, 1.4)) if kind else turned(image, rng)
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    values = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
    mean, std = (np.float32(x)[:, None, None] for x in (stacks.IMAGENET_MEAN, stacks.IMAGENET_STD))
    return (values - mean) / std


def turned(image, rng):
    """The hue turned, as torchvision does on 8 bits."""
    hue, saturation, value = image.convert("HSV").split()
    shift = int(rng.uniform(-0.1, 0.1) * 255)
    hue = Image.fromarray((np.asarray(hue, np.int16) + shift).astype(np.uint8))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def crops(source, split, recipe=RECIPE):
    """Two crops a picture of one of our sources; a batch at a time."""
    made = source.train(split, dict(enumerate(recipe.crops)), BATCH, 0, Position.start(), 100)
    for batch in made:
        yield len(batch.views[0])


def report(loaders, seconds):
    rates = {name: [] for name in loaders}
    for _ in range(3):
        for name, loader in loaders.items():
            rates[name].append(rate(loader(), seconds))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    reference, decode = medians["two-crop Pillow"], medians["bare decode"]
    print(f"{'loader':18} {'images/s':>9} {'of Pillow':>10} {'of decode':>10}   rounds")
    for name, median in medians.items():
        rounds = ", ".join(f"{x:.0f}" for x in rates[name])
        print(
            f"{name:18} {median:9.0f} {median / reference:10.2f} {median / decode:10.2f}   {rounds}"
        )
    print(json.dumps({name: round(median, 1) for name, median in medians.items()}))


def rate(items, seconds):
    """Images a second, the first batch not counted."""
    next(items)
    begin, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds:
        count += next(items)
    items.close()
    return count / spent


if __name__ == "__main__":
    main()
