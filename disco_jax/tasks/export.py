"""Write a trained network in the format of another framework, run it there, and compare."""

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from disco_jax import convert, errors, files, flags
from disco_jax.convert import frameworks, onnx, save, stablehlo, tflite
from disco_jax.tasks import card
from disco_jax.tasks.arguments import Parser
from disco_jax.tasks.opening import Opened, open_network

_LOG = logging.getLogger(__name__)

# Relative error that an export may have: where it computes in float32, and with int8 weights.
TOLERANCE, INT8_TOLERANCE = 1e-4, 0.25


class Format(NamedTuple):
    """A format of export.

    Attributes:
      suffixes: of its files; the first is taken when no output is named.
      naming: of a state dict; "": the format is a program.
    """

    suffixes: tuple[str, ...]
    naming: str = ""


FORMATS = {
    "timm": Format((".pth", ".safetensors"), "timm"),
    "torchvision": Format((".pth", ".safetensors"), "torchvision"),
    "moco": Format((".pth", ".safetensors"), "moco"),
    "detectron2": Format((".pkl",), "detectron2"),
    "safetensors": Format((".safetensors",), "timm"),
    "onnx": Format((".onnx",)),
    "tflite": Format((".tflite",)),
    "tflite-int8": Format((".tflite",)),
    "stablehlo": Format((".stablehlo",)),
}
Check = dict[str, float]


def main(argv: Sequence[str]) -> None:
    """`disco-jax export CHECKPOINT --format F [--output FILE] [--with-head] [--size PX]`."""
    parser = Parser("export", __doc__)
    parser.add_network()
    parser.add_argument("--format", required=True, help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--output", default="", help="the file; by default beside the checkpoint")
    values = parser.read(argv)
    if values is not None:
        flags.prepare_jax()
        run(**vars(values))


def run(
    checkpoint: str,
    *,
    format: str,
    output: str = "",
    with_head: bool = False,
    size: int = 0,
    network: str = "student",
) -> dict[str, Any]:
    """Exports a network and a model card beside it.

    Args:
      checkpoint: the directory of a run or of an import, or a PyTorch file.
      format: one of `FORMATS`.
      output: the file to write; "": `exports/` in the directory, or beside the file.
      with_head: keep the projection head, which the papers throw away: a state dict then holds
        it, and a program computes the embedding instead of the features.
      size: of the images in px that a program takes; 0: the run's.
      network: of a run: "student" or "momentum".

    Returns:
      {"output", "card", "errors": runtime -> largest relative error, ...}.

    Raises:
      UserError: nothing to export, or not in this format.
      RuntimeError: the written file does not compute the same; a file that was there stays.
    """
    if format not in FORMATS:
        raise errors.unknown("--format", format, FORMATS)
    if size < 0:
        raise errors.UserError(f"--size={size} is below 0.")
    opened = open_network(checkpoint, network)
    path = _output(checkpoint, output, format, opened)
    size = size or opened.config.augment.size
    with _checked_first(path) as unchecked:
        if FORMATS[format].naming:
            found, facts = _state_dict(opened, unchecked, FORMATS[format].naming, with_head, size)
        else:
            found, facts = _program(opened, unchecked, format, with_head, size)
        _refuse_wrong(path, format, found)
    result = {"output": str(path), "format": format, "errors": found, **facts}
    result["card"] = str(card.write(path, opened, result, size, with_head))
    print(f"{path} ({path.stat().length / 2**20:.1f} MiB)")
    for runtime, error in found.items():
        print(f"  largest relative error in {runtime}: {error:.1e}")
    print(f"  model card: {result['card']}")
    return result


@contextlib.contextmanager
def _checked_first(path: epath.Path) -> Iterator[epath.Path]:
    """A path of the same name in a folder of its own, which becomes `path` when all went well.

    Until then a file that was there stays as it is; when the export fails nothing new is left.
    """
    made = not path.parent.exists()
    folder = path.parent / f".unchecked.{socket.gethostname()}.{os.getpid()}"
    _remove_killed(path.parent)
    folder.mkdir(parents=True)
    try:
        yield folder / path.name
        (folder / path.name).replace(path)
        folder.rmtree()
    except BaseException:
        (path.parent if made else folder).rmtree()
        raise


def _remove_killed(place: epath.Path) -> None:
    """Removes what exports of this machine have left that were killed."""
    begin = f".unchecked.{socket.gethostname()}."
    for folder in place.glob(f"{begin}*") if place.exists() else ():
        number = folder.name.removeprefix(begin)
        if number.isdecimal() and not files.is_running(int(number)):
            folder.rmtree()


def _output(checkpoint: str, output: str, format: str, opened: Opened) -> epath.Path:
    """Where to write, checked."""
    suffixes = FORMATS[format].suffixes
    if output:
        path = epath.Path(output)
        if path.suffix not in suffixes:
            raise errors.UserError(
                f"--output={output} should end in {' or '.join(suffixes)} for --format={format}."
            )
        if path.is_dir():
            raise errors.UserError(f"--output={output} is a directory; give a file.")
        return path
    source = epath.Path(checkpoint)
    folder = source / "exports" if source.is_dir() else source.parent
    return folder / f"{opened.backbone}-{format}{suffixes[0]}"


def _state_dict(
    opened: Opened, path: epath.Path, naming: str, with_head: bool, size: int
) -> tuple[Check, dict[str, Any]]:
    """Writes a state dict; reads it again here and, where it is installed, in the other world."""
    saved = save.state_dict(opened.backbone, opened.encoder, opened.variables, naming, with_head)
    save.write(path, saved, naming)
    images = _images(size, opened)
    output = "embedding" if with_head else "features"
    # A file does not say which of the backbones with the same names it was written for.
    again = convert.read_network(str(path), arch=_arch(opened.backbone, saved.model))
    ours = np.asarray(opened(images, output))
    with jax.default_matmul_precision("highest"):
        read = again.encoder.apply(again.variables, images, norm="running")
    found = {"disco_jax, read again": _error(getattr(read, output), ours)}
    if saved.model and not with_head and naming in frameworks.FRAMEWORKS:
        if frameworks.installed(naming):
            images = _images(_native(opened, size), opened)
            theirs = frameworks.features(naming, saved.model, path, images)
            found[naming] = _error(theirs, np.asarray(opened(images)))
        else:
            _LOG.warning("%s is not installed: the export was not run in it.", naming)
    return found, {"model": saved.model, "notes": list(saved.notes)}


def _native(opened: Opened, size: int) -> int:
    """The size at which both worlds agree: timm's ViTs do not resize their positions as we do."""
    return opened.encoder.backbone.nominal_size or size


def _arch(backbone: str, model: str) -> str:
    """The backbone of ours that computes what the written weights are for."""
    if model.startswith("mobilenetv3"):
        return "mobilenetv3_large"
    if model == "mobilenet_v3_large":
        return "mobilenetv3_large_tv"
    if model.startswith("tf_"):
        return model
    return backbone


def _program(
    opened: Opened, path: epath.Path, format: str, with_head: bool, size: int
) -> tuple[Check, dict[str, Any]]:
    """Writes a program; runs it in its own runtime for one image and for three."""
    output = "embedding" if with_head else "features"

    def function(images: np.ndarray | jax.Array) -> jax.Array:
        return opened(images, output)

    write, read = _runtime(format)
    write(function, size, path)
    images = _images(size, opened, 3)
    ours = np.asarray(function(images))
    found = {}
    for count in (1, 3):
        error = _error(read(path, images[:count]), ours[:count])
        found[f"{format}, batch of {count}"] = error
    layout = f"f32[B, 3, {size}, {size}]" if format == "onnx" else f"f32[B, {size}, {size}, 3]"
    return found, {"input": layout, "result": f"f32[B, {ours.shape[1]}] {output}", "notes": []}


def _runtime(format: str) -> tuple[Callable[..., None], Callable[..., np.ndarray]]:
    if format == "tflite-int8":
        return lambda function, size, path: tflite.write(function, size, path, True), tflite.run
    module = {"onnx": onnx, "tflite": tflite, "stablehlo": stablehlo}[format]
    return module.write, module.run


def _images(size: int, opened: Opened, count: int = 2) -> np.ndarray:
    """Noise, normalised as images are."""
    noise = np.random.default_rng(0).random((count, size, size, 3), np.float32)
    augment = opened.config.augment
    return ((noise - np.array(augment.mean)) / np.array(augment.std)).astype(np.float32)


def _error(found: Any, expected: np.ndarray) -> float:
    """Largest difference over the largest value."""
    found = np.asarray(found, np.float64)
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


def _refuse_wrong(path: epath.Path, format: str, found: Check) -> None:
    limit = INT8_TOLERANCE if format == "tflite-int8" else TOLERANCE
    if max(found.values()) <= limit:
        return
    raise RuntimeError(f"{path} would not compute the same: {found}; it was not kept.")
