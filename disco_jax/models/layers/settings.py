"""Settings of a config that decide how networks are computed, and the values of their "auto"."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from disco_jax import errors
from disco_jax.ops.collectives import EXCHANGES

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _on_tpu(backend: str) -> str:
    return "on" if backend == "tpu" else "off"


# Config fields that may be "auto": their other values, and the value of "auto" on a backend.
AUTO: dict[str, tuple[tuple[str, ...], Callable[[str], str]]] = {
    "dtype": (tuple(DTYPES), lambda backend: "float32" if backend == "cpu" else "bfloat16"),
    "fast.exchange": (EXCHANGES, lambda backend: "all_to_all" if backend == "tpu" else "gather"),
    "fast.columns": (("on", "off"), _on_tpu),
    "fast.statistics": (("on", "off"), _on_tpu),
    "fast.shifts": (("on", "off"), lambda backend: "on" if backend == "cpu" else "off"),
}
# Values of `config.fast` with which networks are computed by XLA's default layers.
PLAIN: dict[str, Any] = {
    "exchange": "gather", "stem": False, "columns": "off", "statistics": "off", "shifts": "off",
    "teacher": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FastSettings:
    """Settings of speed, the section `config.fast`; they change what is learned only by rounding.

    Attributes:
      losses: read each queue once, in the compute dtype; false: in float32
      half_queue: queues of keys in bfloat16, which halves their memory; `similarity` keeps float32
      shard_queue: Queues of contrast, similarity and bags: each device stores the keys it made and
        compares the queries of all devices with them. Divides the memory of a queue and the time to
        read it by the number of devices.
      exchange: how devices exchange images for shuffled BatchNorm: gather (each device receives
        all) | all_to_all (each device receives what it needs; TPUs only) | auto (all_to_all on
        TPUs)
      stem: the first convolution computes two columns at once, and a ResNet normalises the output
        of its max-pool instead of the input; stored weights do not change
      columns: pack neighbouring columns into the channels of the first layers, which fills a TPU's
        lanes: four in EfficientNets and MobileNets, two in ResNets: on | off | auto (on TPUs)
      statistics: compute the BatchNorm statistics behind a widening 1x1 convolution of the teacher
        and the momentum network from the convolution's input: on | off | auto (on TPUs)
      shifts: compute depthwise, 1x1 and late convolutions and the gradient of a ResNet's max-pool
        as sums and products of shifted maps, also in probes and `embed`: on | off | auto (on CPUs)
      teacher: store the teacher's kernels in the compute dtype, and fold its BatchNorm into the
        layers before it where norm="running"
    """

    losses: bool = True
    half_queue: bool = False
    shard_queue: bool = False
    exchange: str = "auto"
    stem: bool = True
    columns: str = "auto"
    statistics: str = "auto"
    shifts: str = "auto"
    teacher: bool = True


def resolve_auto(field: str, choice: str, backend: str = "") -> str:
    """Returns the value of a config field that may be "auto".

    Args:
      field: name of the field in the config, e.g. "fast.columns".
      choice: its value.
      backend: "cpu", "gpu" or "tpu"; "": the default backend of this process.

    Raises:
      UserError: the field does not allow the value.
    """
    allowed, automatic = AUTO[field]
    if choice == "auto":
        return automatic(backend or jax.default_backend())
    if choice not in allowed:
        raise errors.unknown(f"config.{field}", choice, ["auto", *allowed])
    return choice


def compute_dtype(name: str) -> Any:
    """Returns the dtype of a config's `dtype`: for "auto" float32 on CPUs, bfloat16 elsewhere.

    Raises:
      UserError: the name is unknown.
    """
    return DTYPES[resolve_auto("dtype", name)]
