"""StableHLO: a network as one file that JAX runs on CPUs, GPUs and TPUs without its code."""

from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax import Array, export

from disco_jax import files

# All in one file, whatever machine writes it.
PLATFORMS = ("cpu", "cuda", "tpu")


def write(function: Callable[[Array], Array], size: int, path: epath.PathLike) -> None:
    """Writes a network as a serialised `jax.export.Exported`, its weights inside.

    The batch is of any size. Products are as precise on a GPU or TPU as
    `jax.default_matmul_precision` says where the function is traced, which the file keeps.
    `jax.export.deserialize(data).mlir_module()` shows the program to other readers of StableHLO.
    JAX promises to run it with its releases of the next six months.

    Args:
      function: f32[B, size, size, 3] normalised images -> f32[B, F]; can be jitted, and its
        weights are closed over.
      size: of the images, px.
      path: of the file; replaced whole, or left as it was when anything fails.
    """
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), np.float32)
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(images)
    with files.whole(path) as unfinished:
        unfinished.write_bytes(exported.serialize())


def run(path: epath.PathLike, images: np.ndarray) -> np.ndarray:
    """What a file makes of normalised f32[B, size, size, 3] images on JAX's default device."""
    exported = export.deserialize(bytearray(epath.Path(path).read_bytes()))
    return np.asarray(exported.call(np.asarray(images, np.float32)))
