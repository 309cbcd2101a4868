"""TensorFlow Lite (LiteRT): a network as one file of builtin operators for mobile devices."""

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

    The batch size is fixed at 1: only then does TensorFlow's converter know every shape, fuse
    BatchNorm and activations into the convolutions, and accept every network.

    Args:
      function: f32[B, size, size, 3] normalised images -> f32[B, F]; may be jitted, and closes over
        its weights.
      size: of the images, px.
      path: of the file; written completely, or left unchanged if anything fails.
      int8: store weights in 8 bits with one scale per channel and quantise activations at run time
        ("dynamic range"). A quarter of the size.

    Raises:
      UserError: this TensorFlow's converter lacks operations that this jax writes; known for
        transformers in jax 0.12 and TensorFlow 2.21.
    """
    tf = _tensorflow()
    from jax.experimental import jax2tf

    tf_function = jax2tf.convert(
        function, with_gradient=False, native_serialization_platforms=["cpu"]
    )
    shape = tf.TensorSpec((1, size, size, 3), tf.float32, name="images")
    module = tf.Module()  # preserves the names of input and output
    module.call = tf.function(
        lambda images: {"features": tf_function(images)}, input_signature=[shape], autograph=False
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [module.call.get_concrete_function()], module
    )
    if int8:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    try:
        with _silent():
            content = converter.convert()
    except Exception as error:  # the converter's own type is private
        raise UserError(
            f"TensorFlow {tf.__version__} cannot translate this network as jax {jax.__version__} "
            'writes it: export in an environment with jax 0.10 (pip install "jax<0.11" disco-jax), '
            "or in another format."
        ) from error
    with files.whole(path) as unfinished:
        unfinished.write_bytes(content)


def run(path: epath.PathLike, images: np.ndarray) -> np.ndarray:
    """Computes the output of a file for normalised f32[B, size, size, 3] images, one at a time.

    Raises:
      UserError: neither TensorFlow nor LiteRT can run it.
    """
    model = _interpreter(epath.Path(path).read_bytes()).get_signature_runner()
    images = np.asarray(images, np.float32)
    return np.concatenate([model(images=image[None])["features"] for image in images])


def _tensorflow() -> ModuleType:
    """Imports TensorFlow without its log output and without access to GPUs."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    tf.config.set_visible_devices([], "GPU")
    return tf


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discards output to stderr.

    The converter prints what it cannot translate, which is the whole network with its weights. It
    prints from C++, past Python's `sys.stderr`.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    os.close(devnull)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _interpreter(content: bytes) -> Any:
    """Returns an interpreter: TensorFlow's if it still has one, otherwise LiteRT's."""
    lite = _tensorflow().lite
    if not hasattr(lite, "Interpreter"):
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise UserError(
                "This TensorFlow no longer runs TFLite files: pip install ai-edge-litert."
            ) from error
        return Interpreter(model_content=content)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*Warning: tf\.lite\.Interpreter is deprecated")
        return lite.Interpreter(model_content=content)
