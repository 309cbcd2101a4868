"""StableHLO: a network as one file that JAX runs on CPUs, GPUs and TPUs without its source code."""

from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax import Array, export

from disco_jax import files

# Every file runs on all of them, whichever machine writes it.
PLATFORMS = ("cpu", "cuda", "tpu")


def write(function: Callable[[Array], Array], size: int, path: epath.PathLike) -> None:
    """Writes a network as a serialised `jax.export.Exported` that contains its weights.

    The batch size is free. `jax.default_matmul_precision`, as set where the function is traced, is
    stored in the file and determines the precision of products on a GPU or TPU.
    `jax.export.deserialize(data).mlir_module()` returns the program for other readers of StableHLO.
    JAX guarantees that its releases of the following six months run it.

    Args:
      function: f32[B, size, size, 3] normalised images -> f32[B, F]; may be jitted, and closes over
        its weights.
      size: of the images, px.
      path: of the file; written completely, or left unchanged if anything fails.
    """
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), np.float32)
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(images)
    with files.whole(path) as unfinished:
        unfinished.write_bytes(exported.serialize())


def run(path: epath.PathLike, images: np.ndarray) -> np.ndarray:
    """Runs a file on normalised f32[B, size, size, 3] images on JAX's default device."""
    exported = export.deserialize(bytearray(epath.Path(path).read_bytes()))
    return np.asarray(exported.call(np.asarray(images, np.float32)))
