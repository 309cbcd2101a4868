"""ONNX: a network as one file for onnxruntime and other readers of the format."""

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator
from types import ModuleType

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array

from disco_jax import files
from disco_jax.errors import UserError

# The oldest operator set that jax2onnx writes correctly.
OPSET = 18
# Protocol buffers hold less than 2 GiB; larger weights would need a second file.
_MAX_BYTES = 2**31 - 1


def write(function: Callable[[Array], Array], size: int, path: epath.PathLike) -> None:
    """Writes a network as a model: "images" f32[batch, 3, size, size] -> "features" f32[batch, F].

    Args:
      function: f32[B, size, size, 3] normalised images -> f32[B, F]; may be jitted, and closes over
        its weights. The file takes channels first, the convention of ONNX.
      size: of the images, px.
      path: of the file; written completely, or left unchanged if anything fails.

    Raises:
      UserError: jax2onnx is not installed or does not support this jax (0.17.1 lacks operations of
        some networks in jax 0.12), or the weights are too large for one file.
    """
    with _quiet():
        to_onnx = _package("jax2onnx").to_onnx

    def padded(images: Array) -> Array:
        with _padded_pools():
            return function(images)

    with _quiet(), jax.numpy_rank_promotion("allow"):  # jax2onnx broadcasts biases
        try:
            model = to_onnx(
                padded,
                [("batch", size, size, 3)],
                model_name="disco_jax",
                opset=OPSET,
                inputs_as_nchw=[0],
                input_names=["images"],
                output_names=["features"],
            )
        # jax2onnx uses jax's private names, which change, and looks operations up by name.
        except (AttributeError, NotImplementedError) as error:
            raise UserError(
                f"The installed jax2onnx does not support jax {jax.__version__} ({error}): export "
                'in an environment with jax 0.10 (pip install "jax<0.11" "disco-jax[onnx]"), or in '
                "another format."
            ) from error
    if model.ByteSize() > _MAX_BYTES:
        raise UserError("The weights exceed 2 GiB, the limit of one ONNX file.")
    with files.whole(path) as unfinished:
        unfinished.write_bytes(model.SerializeToString())


def run(path: epath.PathLike, images: np.ndarray) -> np.ndarray:
    """Computes the output of a file for images in onnxruntime, on the CPU.

    Args:
      path: of the file.
      images: f32[B, size, size, 3], normalised.

    Raises:
      UserError: onnxruntime is not installed.
    """
    runtime = _package("onnxruntime")
    session = runtime.InferenceSession(
        epath.Path(path).read_bytes(), providers=["CPUExecutionProvider"]
    )
    channels_first = np.asarray(images, np.float32).transpose(0, 3, 1, 2)
    return session.run(["features"], {"images": channels_first})[0]


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f'{name} cannot be imported: pip install "disco-jax[onnx]".') from error


@contextlib.contextmanager
def _padded_pools() -> Iterator[None]:
    """Pads before max-pools: jax2onnx 0.17 ignores padding given in numbers."""
    original = nn.max_pool

    def max_pool(x, window_shape, strides=None, padding="VALID"):
        if not isinstance(padding, str):
            widths = ((0, 0), *padding, (0, 0))
            x, padding = jnp.pad(x, widths, constant_values=-jnp.inf), "VALID"
        return original(x, window_shape=window_shape, strides=strides, padding=padding)

    nn.max_pool = max_pool
    try:
        yield
    finally:
        nn.max_pool = original


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the loggers of jax2onnx.

    They log a line for each inner shape that the file does not record, and a traceback for each
    optional package that is not installed.
    """
    loggers = [logging.getLogger(name) for name in ("onnx_ir.serde", "jax2onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
