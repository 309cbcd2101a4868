"""TensorFlow Lite (LiteRT): a network as one file of builtin operators for phones and boards."""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import numpy as np
from etils import epath
from jax import Array

from disco_jax import files
from disco_jax.errors import UserError


def write(
    function: Callable[[Array], Array], size: int, path: epath.PathLike, int8: bool = False
) -> None:
    """Writes a network as a model: "images" f32[1, size, size, 3] -> "features" f32[1, F].

    One image, because only then does TensorFlow's converter know every shape, fuse BatchNorm and
    activations into the convolutions, and take every network.

    Args:
      function: f32[B, size, size, 3] normalised images -> f32[B, F]; can be jitted, and its
        weights are closed over.
      size: of the images, px.
      path: of the file; replaced whole, or left as it was when anything fails.
      int8: keep weights in 8 bits, with a scale for each channel; what they are multiplied with
        is quantised on the fly ("dynamic range"). A quarter of the size.

    Raises:
      UserError: this TensorFlow's converter lacks what this jax writes; seen with transformers in
        jax 0.12 and TensorFlow 2.21.
    """
    tf = _tensorflow()
    from jax.experimental import jax2tf

    compute = jax2tf.convert(function, with_gradient=False, native_serialization_platforms=["cpu"])
    shape = tf.TensorSpec((1, size, size, 3), tf.float32, name="images")
    module = tf.Module()  # without one the names of input and output are lost
    module.call = tf.function(
        lambda images: {"features": compute(images)}, input_signature=[shape], autograph=False
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [module.call.get_concrete_function()], module
    )
    if int8:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    try:
        with _silent():
            content = converter.convert()
    except Exception as error:  # of a private module of TensorFlow
        raise UserError(
            f"TensorFlow {tf.__version__} cannot translate this network as jax {jax.__version__} "
            'writes it: export in an environment with jax 0.10 (pip install "jax<0.11" disco-jax), '
            "or in another format."
        ) from error
    with files.whole(path) as unfinished:
        unfinished.write_bytes(content)


def run(path: epath.PathLike, images: np.ndarray) -> np.ndarray:
    """What a file makes of normalised f32[B, size, size, 3] images, one after the other.

    Raises:
      UserError: neither TensorFlow nor LiteRT can run it.
    """
    model = _interpreter(epath.Path(path).read_bytes()).get_signature_runner()
    images = np.asarray(images, np.float32)
    return np.concatenate([model(images=image[None])["features"] for image in images])


def _tensorflow() -> ModuleType:
    """TensorFlow, kept off the accelerators and silent."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    tf.config.set_visible_devices([], "GPU")
    return tf


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what is written to stderr: the converter prints what it cannot translate, which is
    the whole network with its weights. It does so from C++, past Python's `sys.stderr`.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _interpreter(content: bytes) -> Any:
    """The runtime that TensorFlow still brings, or else LiteRT's, where it has moved."""
    lite = _tensorflow().lite
    if not hasattr(lite, "Interpreter"):
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise UserError(
                "This TensorFlow runs no TFLite files any more: pip install ai-edge-litert."
            ) from error
        return Interpreter(model_content=content)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*Warning: tf\.lite\.Interpreter is deprecated")
        return lite.Interpreter(model_content=content)
