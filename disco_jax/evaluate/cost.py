"""Cost of a network: parameters, multiply-adds and CPU latency."""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from disco_jax import models
from disco_jax.models.encoder import Encoder

_WARM_UP = 3


def multiply_adds(encoder: Encoder, size: int) -> int:
    """Counts multiply-adds of all convolutions and matrix products for one image, without the head.

    Papers call this number FLOPs; a multiplication and the addition after it count as one.

    Args:
      encoder: the network.
      size: side of the image, px.
    """
    # Optimized layers multiply zeros too, or add shifted maps instead of convolving.
    encoder = encoder.with_compute(encoder.compute.plain())
    variables = jax.eval_shape(lambda: encoder.create(0, size))
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return _count(jax.make_jaxpr(lambda v, x: _features(encoder, v, x))(variables, image).jaxpr)


def latency(encoder: Encoder, size: int, repeats: int = 30, seed: int = 0) -> dict[str, float]:
    """Measures the milliseconds from one image to its features on this machine's CPU, batch size 1.

    Args:
      encoder: the network; the time does not depend on its weights.
      size: side of the image, px.
      repeats: number of timed runs; a few untimed runs precede them.
      seed: seed of the weights and the image.

    Returns:
      {"median_ms", "low_ms", "high_ms"}: the median, and the 10th and 90th percentile.
    """
    cpu = jax.local_devices(backend="cpu")[0]
    image = np.random.default_rng(seed).normal(size=(1, size, size, 3)).astype(np.float32)
    encoder = encoder.with_compute(dataclasses.replace(encoder.compute, shift_and_add=True))
    variables, image = jax.device_put((encoder.create(seed, size), image), cpu)
    apply = jax.jit(lambda v, x: _features(encoder, v, x))
    times = []
    for _ in range(_WARM_UP + repeats):
        started = time.perf_counter()
        jax.block_until_ready(apply(variables, image))
        times.append(1000 * (time.perf_counter() - started))
    low, median, high = np.percentile(times[_WARM_UP:], (10, 50, 90)).tolist()
    return {"median_ms": median, "low_ms": low, "high_ms": high}


def of(encoder: Encoder, size: int, repeats: int) -> dict[str, Any]:
    """Returns {"parameters", "multiply_adds", "median_ms", "low_ms", "high_ms"} in float32."""
    return {
        "parameters": models.parameters(encoder, size=size),
        "multiply_adds": multiply_adds(encoder, size),
        **latency(encoder, size, repeats),
    }


def _features(encoder: Encoder, variables: Any, images: Any) -> jax.Array:
    outputs: Any = encoder.apply(
        variables, images, norm="running", outputs=("features",), method="read"
    )
    return outputs["features"]


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in equation.invars]
        out_size = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "conv_general_dilated":
            kernel = shapes[1]
            out_channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            total += out_size * math.prod(kernel) // out_channels
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += out_size * math.prod(shapes[0][axis] for axis in contracted)
        repeats = equation.params.get("length", 1)  # iterations of a scan
        for inner in jaxprs_in_params(equation.params):
            total += repeats * _count(inner)
    return total
