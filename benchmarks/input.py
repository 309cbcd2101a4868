"""Images a second of the input pipeline, against a torchvision-style loader, in one run.

    python benchmarks/input.py [--images 200] [--seconds 4] [--data DIR --name imagenet2012]

Everything runs on one core, in turns, for five rounds; the medians and those of the ratios within a
round are printed as a table and as one line of JSON, then what each stage costs. Without --data the
pictures are photographs' stand-ins: smooth noise of 500 x 375 px, saved as JPEG of quality 92.

  bare decode        the whole JPEG to pixels and nothing else, the faster of Pillow and OpenCV
  two-crop Pillow    what torchvision's MoCo-v2 loader does on PIL images: decode, two random
                     resized crops, colour jitter, grey, Pillow's blur, flip, to float, normalise
  torchvision        the same by torchvision's own transforms, where it is installed; "GaussianBlur"
                     with its own blur (23 taps), which many loaders have in the place of Pillow's
  folder, tfds       `FolderSource` and `TfdsSource`: two 224 px crops, uint8, the rest is the
                     step's; "area" is the default of the recipes
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

os.environ["OMP_NUM_THREADS"] = "1"
with contextlib.suppress(AttributeError):  # Linux alone pins a process to a core
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from disco_jax.data import decode, folders, presets, sources, views
from disco_jax.data.base import Position
from disco_jax.data.crops import boxes, uniforms

SIZE, BATCH = 224, 32
RECIPE = views.build(presets.PRESETS["moco_v2"])


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
        }
        for kind in views.ANTIALIAS:
            loaders[f"folder, {kind}"] = lambda kind=kind: crops(
                folders.FolderSource(folder), "train", kind
            )
        if values.data:
            opened = sources.TfdsSource(values.name, values.data)
            split = max(opened.splits, key=opened.count)
            for kind in views.ANTIALIAS:
                loaders[f"tfds, {kind}"] = lambda kind=kind: crops(opened, split, kind)
        timed = {name: partial(timed_here, loader) for name, loader in loaders.items()}
        if importlib.util.find_spec("torchvision"):
            for blur in ("Pillow", "GaussianBlur"):
                timed[f"torchvision, {blur}"] = partial(timed_apart, folder, blur)
        report(timed, values.seconds)
        stages(encoded)


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
        decode.decode(picture)
        yield 1


def torchvision(encoded, blur):
    """torchvision's own transforms of MoCo-v2."""
    import torch
    import torchvision.transforms as T

    torch.set_num_threads(1)

    def pillows(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    stack = T.Compose(
        [
            T.RandomResizedCrop(SIZE, (0.2, 1.0)),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([pillows if blur == "Pillow" else T.GaussianBlur(23, (0.1, 2.0))], 0.5),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(presets.IMAGENET_MEAN, presets.IMAGENET_STD),
        ]
    )
    for picture in itertools.cycle(encoded):
        with Image.open(io.BytesIO(picture)) as opened:
            image = opened.convert("RGB")
        stack(image), stack(image)
        yield 1


def timed_here(loader, seconds):
    return rate(loader(), seconds)


def timed_apart(folder, blur, seconds):
    """In a process of its own: PyTorch and TensorFlow do not get along in one."""
    loader = f"input.torchvision(input.files({folder!r}), {blur!r})"
    code = f"import input; print(input.rate({loader}, {seconds}))"
    here = pathlib.Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def files(folder):
    return [path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())]


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
    mean, std = (
        np.float32(x)[:, None, None] for x in (presets.IMAGENET_MEAN, presets.IMAGENET_STD)
    )
    return (values - mean) / std


def turned(image, rng):
    """The hue turned, as torchvision does on 8 bits."""
    hue, saturation, value = image.convert("HSV").split()
    shift = int(rng.uniform(-0.1, 0.1) * 255)
    hue = Image.fromarray((np.asarray(hue, np.int16) + shift).astype(np.uint8))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def crops(source, split, antialias):
    """Two crops a picture of one of our sources; a batch at a time."""
    recipe = views.build({**presets.PRESETS["moco_v2"], "antialias": antialias})
    made = source.train(split, dict(enumerate(recipe.crops)), BATCH, 0, Position.start(), 100)
    for batch in made:
        yield len(batch.views[0])


def stages(encoded, rounds=3):
    """Milliseconds an image of each stage of our pipeline, and how much of it is Python's own."""
    images = [decode.decode(picture) for picture in encoded]
    sides = np.array([image.shape[:2] for image in images])
    crop = RECIPE.crops[0]

    def drawn():
        for begin in range(0, len(encoded), 16):
            some = sides[begin : begin + 16]
            for view in range(2):
                draws = uniforms(0, 0, 0, view, begin, len(some))
                boxes(draws, *some.T, crop.scale, crop.ratio)

    draws = uniforms(0, 0, 0, 0, 0, len(encoded))
    places = boxes(draws, *sides.T, crop.scale, crop.ratio).tolist()

    def cut(kind):
        for image, (top, left, height, width) in zip(images, places, strict=True):
            part = image[top : top + height, left : left + width]
            decode.resize(part, SIZE, SIZE, "bilinear", kind)

    made = {
        "read the header": lambda: [decode._header(picture) for picture in encoded],
        "draw two boxes": drawn,
        "decode (OpenCV)": lambda: [decode.decode(picture) for picture in encoded],
        "decode (Pillow)": lambda: [
            np.asarray(Image.open(io.BytesIO(p)).convert("RGB")) for p in encoded
        ],
        **{f"resize two crops, {kind}": lambda kind=kind: cut(kind) for kind in views.ANTIALIAS},
        "put a batch together": lambda: [np.stack([c] * BATCH) for c in [images[0][:SIZE, :SIZE]]],
    }
    for name, stage in made.items():
        times = []
        for _ in range(rounds):
            begin = time.process_time()
            stage()
            times.append(time.process_time() - begin)
        per = BATCH if name.startswith("put") else len(encoded)
        twice = 2 if "two crops" in name or name.startswith("put") else 1
        print(f"{name:28} {1e3 * twice * statistics.median(times) / per:7.3f} ms an image")


def report(timed, seconds, rounds=5):
    """Medians over rounds of images/s, and of the ratios within a round."""
    rates = {name: [] for name in timed}
    for _ in range(rounds):
        for name, measure in timed.items():
            rates[name].append(measure(seconds))
    against = [
        n for n in ("torchvision, GaussianBlur", "two-crop Pillow", "bare decode") if n in rates
    ]
    print(f"{'loader':26} {'images/s':>9} " + " ".join(f"{'of ' + n:>28}" for n in against))
    table = {}
    for name, found in rates.items():
        ratios = [
            statistics.median(x / y for x, y in zip(found, rates[other], strict=True))
            for other in against
        ]
        table[name] = [round(x, 2) for x in (statistics.median(found), *ratios)]
        print(f"{name:26} {table[name][0]:9.0f} " + " ".join(f"{x:28.2f}" for x in ratios))
    print(json.dumps(table))


def rate(items, seconds):
    """Images a second of processor time, all threads together, the first batch not counted.

    On one core that is the time on the clock, less what other programs take.
    """
    next(items)
    begin, count = time.process_time(), 0
    while (spent := time.process_time() - begin) < seconds:
        count += next(items)
    items.close()
    return count / spent


if __name__ == "__main__":
    main()
