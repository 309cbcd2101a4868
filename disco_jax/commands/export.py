"""Export a trained network to another framework, run it there and compare the features."""

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
from disco_jax.arguments import Parser
from disco_jax.convert import frameworks, onnx, save, stablehlo, tflite
from disco_jax.evaluate.open_model import OpenedModel, open_model
from disco_jax.report import model_card

_LOG = logging.getLogger(__name__)

# Largest relative error of an export: in float32, and with int8 weights.
TOLERANCE, INT8_TOLERANCE = 1e-4, 0.25


class Format(NamedTuple):
    """A format of export.

    Attributes:
      suffixes: of its files; the first is the default.
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
    """Runs `disco-jax export CHECKPOINT --format F [--output FILE] [--with-head] [--size PX]`."""
    parser = Parser("export", __doc__)
    parser.add_network()
    parser.add_argument("--format", required=True, help=f"one of {', '.join(FORMATS)}")
    parser.add_argument(
        "--output", default="", help="output file; by default beside the checkpoint"
    )
    arguments = parser.read(argv)
    if arguments is not None:
        flags.prepare_jax()
        run(**vars(arguments))


def run(
    checkpoint: str,
    *,
    format: str,
    output: str = "",
    with_head: bool = False,
    size: int = 0,
    network: str = "student",
) -> dict[str, Any]:
    """Exports a network and writes a model card beside it.

    Args:
      checkpoint: the directory of a run or of an import, or a PyTorch file.
      format: one of `FORMATS`.
      output: the file to write; "": `exports/` in the directory, or beside the file.
      with_head: keep the projection head, which the papers discard: a state dict then contains it,
        and a program computes the embedding instead of the features.
      size: of the images of a program, px; 0: the run's.
      network: of a run: "student" or "momentum".

    Returns:
      {"output", "card", "errors": runtime -> largest relative error, ...}.

    Raises:
      UserError: there is nothing to export, or the format cannot represent the network.
      RuntimeError: the written file computes other features; an existing file is kept.
    """
    if format not in FORMATS:
        raise errors.unknown("--format", format, FORMATS)
    if size < 0:
        raise errors.UserError(f"--size={size} is below 0.")
    opened = open_model(checkpoint, network)
    path = _output(checkpoint, output, format, opened)
    size = size or opened.settings.augment.size
    with _replaced_on_success(path) as unchecked:
        if FORMATS[format].naming:
            deviations, facts = _state_dict(
                opened, unchecked, FORMATS[format].naming, with_head, size
            )
        else:
            deviations, facts = _program(opened, unchecked, format, with_head, size)
        _refuse_wrong(path, format, deviations)
    result = {"output": str(path), "format": format, "errors": deviations, **facts}
    result["card"] = str(model_card.write(path, opened, result, size, with_head))
    print(f"{path} ({path.stat().length / 2**20:.1f} MiB)")
    for runtime, error in deviations.items():
        print(f"  largest relative error in {runtime}: {error:.1e}")
    print(f"  model card: {result['card']}")
    return result


@contextlib.contextmanager
def _replaced_on_success(path: epath.Path) -> Iterator[epath.Path]:
    """Yields a path in a temporary folder; the file there replaces `path` at the end.

    If the export fails, an existing file is unchanged and nothing new remains.
    """
    new_parent = not path.parent.exists()
    folder = path.parent / f".unchecked.{socket.gethostname()}.{os.getpid()}"
    _remove_killed(path.parent)
    folder.mkdir(parents=True)
    try:
        yield folder / path.name
        (folder / path.name).replace(path)
        folder.rmtree()
    except BaseException:
        (path.parent if new_parent else folder).rmtree()
        raise


def _remove_killed(parent: epath.Path) -> None:
    """Removes the temporary folders of exports that were killed on this machine."""
    start = f".unchecked.{socket.gethostname()}."
    for folder in parent.glob(f"{start}*") if parent.exists() else ():
        number = folder.name.removeprefix(start)
        if number.isdecimal() and not files.is_running(int(number)):
            folder.rmtree()


def _output(checkpoint: str, output: str, format: str, opened: OpenedModel) -> epath.Path:
    """Returns the path to write to; refuses a wrong suffix and a directory."""
    suffixes = FORMATS[format].suffixes
    if output:
        path = epath.Path(output)
        if path.suffix not in suffixes:
            raise errors.UserError(
                f"--output={output} should end in {' or '.join(suffixes)} for --format={format}."
            )
        if path.is_dir():
            raise errors.UserError(f"--output={output} is a directory: give a file.")
        return path
    source = epath.Path(checkpoint)
    folder = source / "exports" if source.is_dir() else source.parent
    return folder / f"{opened.backbone}-{format}{suffixes[0]}"


def _state_dict(
    opened: OpenedModel, path: epath.Path, naming: str, with_head: bool, size: int
) -> tuple[Check, dict[str, Any]]:
    """Writes a state dict, then reads it here and, if installed, in the other framework."""
    saved = save.state_dict(opened.backbone, opened.encoder, opened.variables, naming, with_head)
    save.write(path, saved, naming)
    images = _images(size, opened)
    output = "embedding" if with_head else "features"
    # Several backbones share one naming, so the file alone does not identify the backbone.
    again = convert.read_network(str(path), arch=saved.backbone)
    expected = np.asarray(opened(images, output))
    with jax.default_matmul_precision("highest"):
        encoded = again.encoder.apply(again.variables, images, norm="running")
    deviations = {"disco_jax, read again": _error(getattr(encoded, output), expected)}
    if saved.model and not with_head and naming in frameworks.FRAMEWORKS:
        if frameworks.installed(naming):
            images = _images(_native(opened, size), opened)
            features = frameworks.features(naming, saved.model, path, images)
            deviations[naming] = _error(features, np.asarray(opened(images)))
        else:
            _LOG.warning("%s is not installed: the export was not verified in it.", naming)
    return deviations, {"model": saved.model, "notes": list(saved.notes)}


def _native(opened: OpenedModel, size: int) -> int:
    """Returns the size at which both frameworks agree: timm resizes ViT positions differently."""
    return opened.encoder.backbone.nominal_size or size


def _program(
    opened: OpenedModel, path: epath.Path, format: str, with_head: bool, size: int
) -> tuple[Check, dict[str, Any]]:
    """Writes a program and runs it in its runtime on one image and on three."""
    output = "embedding" if with_head else "features"

    def function(images: np.ndarray | jax.Array) -> jax.Array:
        return opened(images, output)

    write, read = _runtime(format)
    write(function, size, path)
    images = _images(size, opened, 3)
    expected = np.asarray(function(images))
    deviations = {}
    for count in (1, 3):
        error = _error(read(path, images[:count]), expected[:count])
        deviations[f"{format}, batch of {count}"] = error
    layout = f"f32[B, 3, {size}, {size}]" if format == "onnx" else f"f32[B, {size}, {size}, 3]"
    return deviations, {
        "input": layout,
        "result": f"f32[B, {expected.shape[1]}] {output}",
        "notes": [],
    }


def _runtime(format: str) -> tuple[Callable[..., None], Callable[..., np.ndarray]]:
    if format == "tflite-int8":
        return lambda function, size, path: tflite.write(function, size, path, True), tflite.run
    module = {"onnx": onnx, "tflite": tflite, "stablehlo": stablehlo}[format]
    return module.write, module.run


def _images(size: int, opened: OpenedModel, count: int = 2) -> np.ndarray:
    """Returns noise, normalised like the network's images."""
    noise = np.random.default_rng(0).random((count, size, size, 3), np.float32)
    augment = opened.settings.augment
    return ((noise - np.array(augment.mean)) / np.array(augment.std)).astype(np.float32)


def _error(actual: Any, expected: np.ndarray) -> float:
    """Returns the largest absolute difference over the largest absolute expected value."""
    actual = np.asarray(actual, np.float64)
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))


def _refuse_wrong(path: epath.Path, format: str, deviations: Check) -> None:
    limit = INT8_TOLERANCE if format == "tflite-int8" else TOLERANCE
    if max(deviations.values()) <= limit:
        return
    raise RuntimeError(
        f"{path} was not written: its relative errors {deviations} exceed {limit:g}."
    )
