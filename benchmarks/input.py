"""Throughput of the input pipeline in images/s, compared with a torchvision-style loader.

    python benchmarks/input.py [--images 200] [--seconds 4] [--data DIR --name imagenet2012]

All loaders run on one core, in turns, for five rounds. Prints the medians of images/s and of the
ratios within a round, as a table and as one line of JSON, then the cost of each stage. Without
--data the images are synthetic: smooth noise of 500 x 375 px, saved as JPEG of quality 92.

  bare decode        decodes the whole JPEG to pixels, with the faster of Pillow and OpenCV
  two-crop Pillow    torchvision's MoCo-v2 loader on PIL images: decode, two random resized crops,
                     colour jitter, grey, Pillow's blur, flip, conversion to float, normalization
  torchvision        the same with torchvision's own transforms, if installed; "GaussianBlur" uses
                     its own blur (23 taps), which many loaders have instead of Pillow's
  folder, tfds       `FolderSource` and `TfdsSource`: two 224 px crops in uint8, the rest is part
                     of the step; "area" is the default of the recipes
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
with contextlib.suppress(AttributeError):  # only Linux can pin a process to a core
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from disco_jax.data import decode, folders, presets, sources, views
from disco_jax.data.contract import Position
from disco_jax.data.crops import boxes, uniforms

SIZE, BATCH = 224, 32
RECIPE = views.build(presets.PRESETS["moco_v2"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="seconds of each loader in each round"
    )
    parser.add_argument("--data", default="", help="directory of prepared TFDS data sets")
    parser.add_argument("--name", default="imagenet2012")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        encoded = stored_jpegs(args) if args.data else synthetic(args.images)
        for i, picture in enumerate(encoded):
            pathlib.Path(folder, f"{i:05}.jpg").write_bytes(picture)
        loaders = {
            "bare decode": lambda: bare(encoded),
            "two-crop Pillow": lambda: two_crops(encoded),
        }
        for antialias in views.ANTIALIAS:
            loaders[f"folder, {antialias}"] = lambda antialias=antialias: crops(
                folders.FolderSource(folder), "train", antialias
            )
        if args.data:
            source = sources.TfdsSource(args.name, args.data)
            split = max(source.splits, key=source.count)
            for antialias in views.ANTIALIAS:
                loaders[f"tfds, {antialias}"] = lambda antialias=antialias: crops(
                    source, split, antialias
                )
        measures = {name: partial(rate_in_process, loader) for name, loader in loaders.items()}
        if importlib.util.find_spec("torchvision"):
            for blur in ("Pillow", "GaussianBlur"):
                measures[f"torchvision, {blur}"] = partial(rate_in_subprocess, folder, blur)
        report(measures, args.seconds)
        stages(encoded)


def stored_jpegs(args):
    """Returns JPEGs of a prepared data set, as stored."""
    source = sources.TfdsSource(args.name, args.data)
    split = max(source.splits, key=source.count)
    _, tfds = sources.tensorflow()
    builder = tfds.builder_from_directory(str(sources.find(args.name, args.data)))
    decoders = {"image": tfds.decode.SkipDecoding()}
    records = builder.as_dataset(split=split, decoders=decoders).take(args.images)
    return [record["image"] for record in records.as_numpy_iterator()]


def synthetic(count):
    """Generates JPEGs of smooth noise with some grain, as slow to decode as photographs."""
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
    """Yields 1 per image that torchvision's own transforms of MoCo-v2 processed."""
    import torch
    import torchvision.transforms as T

    torch.set_num_threads(1)

    def pillow_blur(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    stack = T.Compose(
        [
            T.RandomResizedCrop(SIZE, (0.2, 1.0)),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply(
                [pillow_blur if blur == "Pillow" else T.GaussianBlur(23, (0.1, 2.0))], 0.5
            ),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(presets.IMAGENET_MEAN, presets.IMAGENET_STD),
        ]
    )
    for picture in itertools.cycle(encoded):
        with Image.open(io.BytesIO(picture)) as file:
            image = file.convert("RGB")
        stack(image), stack(image)
        yield 1


def rate_in_process(loader, seconds):
    return rate(loader(), seconds)


def rate_in_subprocess(folder, blur, seconds):
    """Measures torchvision's rate in a subprocess; PyTorch and TensorFlow conflict in one."""
    loader = f"input.torchvision(input.files({folder!r}), {blur!r})"
    code = f"import input; print(input.rate({loader}, {seconds}))"
    here = pathlib.Path(__file__).parent
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True
    )
    return float(process.stdout)


def files(folder):
    return [path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())]


def two_crops(encoded):
    """Yields 1 per image from which it made MoCo-v2's two views with PIL."""
    rng = np.random.default_rng(0)
    for picture in itertools.cycle(encoded):
        with Image.open(io.BytesIO(picture)) as file:
            image = file.convert("RGB")
        for _ in range(2):
            augmented(rng, image)
        yield 1


def augmented(rng, image):
    crop = RECIPE.crops[0]
    sides = np.array([image.height]), np.array([image.width])
    top, left_edge, height, width = map(
        int, boxes(rng.random((1, 12, 2)), *sides, crop.scale, crop.ratio)[0]
    )
    image = image.crop((left_edge, top, left_edge + width, top + height))
    image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    if rng.random() < 0.8:
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color, None)
        for kind in rng.permutation(np.array(enhancers, object)):
            image = kind(image).enhance(rng.uniform(0.6, 1.4)) if kind else hue_jittered(image, rng)
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


def hue_jittered(image, rng):
    """Rotates the hue on 8 bits, as torchvision does."""
    hue, saturation, value = image.convert("HSV").split()
    shift = int(rng.uniform(-0.1, 0.1) * 255)
    hue = Image.fromarray((np.asarray(hue, np.int16) + shift).astype(np.uint8))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def crops(source, split, antialias):
    """Yields the batch sizes of a source that makes two crops per image."""
    recipe = views.build({**presets.PRESETS["moco_v2"], "antialias": antialias})
    batches = source.train(split, dict(enumerate(recipe.crops)), BATCH, 0, Position.start(), 100)
    for batch in batches:
        yield len(batch.views[0])


def stages(encoded, rounds=3):
    """Prints the milliseconds per image of each stage of our pipeline."""
    images = [decode.decode(picture) for picture in encoded]
    sides = np.array([image.shape[:2] for image in images])
    crop = RECIPE.crops[0]

    def draw_boxes():
        for begin in range(0, len(encoded), 16):
            chunk = sides[begin : begin + 16]
            for view in range(2):
                draws = uniforms(0, 0, 0, view, begin, len(chunk))
                boxes(draws, *chunk.T, crop.scale, crop.ratio)

    draws = uniforms(0, 0, 0, 0, 0, len(encoded))
    crop_boxes = boxes(draws, *sides.T, crop.scale, crop.ratio).tolist()

    def resize_crops(antialias):
        for image, (top, left_edge, height, width) in zip(images, crop_boxes, strict=True):
            part = image[top : top + height, left_edge : left_edge + width]
            decode.resize(part, SIZE, SIZE, "bilinear", antialias)

    stage_functions = {
        "read the header": lambda: [decode._header(picture) for picture in encoded],
        "draw two boxes": draw_boxes,
        "decode (OpenCV)": lambda: [decode.decode(picture) for picture in encoded],
        "decode (Pillow)": lambda: [
            np.asarray(Image.open(io.BytesIO(p)).convert("RGB")) for p in encoded
        ],
        **{
            f"resize two crops, {antialias}": lambda antialias=antialias: resize_crops(antialias)
            for antialias in views.ANTIALIAS
        },
        "put a batch together": lambda: [np.stack([c] * BATCH) for c in [images[0][:SIZE, :SIZE]]],
    }
    for name, stage in stage_functions.items():
        times = []
        for _ in range(rounds):
            begin = time.process_time()
            stage()
            times.append(time.process_time() - begin)
        images_per_call = BATCH if name.startswith("put") else len(encoded)
        crops_per_image = 2 if "two crops" in name or name.startswith("put") else 1
        milliseconds = 1e3 * crops_per_image * statistics.median(times) / images_per_call
        print(f"{name:28} {milliseconds:7.3f} ms per image")


def report(measures, seconds, rounds=5):
    """Prints medians over rounds of images/s, and of the ratios within a round."""
    rates = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            rates[name].append(measure(seconds))
    baselines = [
        n for n in ("torchvision, GaussianBlur", "two-crop Pillow", "bare decode") if n in rates
    ]
    print(f"{'loader':26} {'images/s':>9} " + " ".join(f"{'of ' + n:>28}" for n in baselines))
    table = {}
    for name, measured in rates.items():
        ratios = [
            statistics.median(x / y for x, y in zip(measured, rates[other], strict=True))
            for other in baselines
        ]
        table[name] = [round(x, 2) for x in (statistics.median(measured), *ratios)]
        print(f"{name:26} {table[name][0]:9.0f} " + " ".join(f"{x:28.2f}" for x in ratios))
    print(json.dumps(table))


def rate(items, seconds):
    """Measures images per second of processor time over all threads, without the first batch.

    On one core this equals the wall clock time, less the time that other programs take.
    """
    next(items)
    begin, count = time.process_time(), 0
    while (elapsed := time.process_time() - begin) < seconds:
        count += next(items)
    items.close()
    return count / elapsed


if __name__ == "__main__":
    main()
