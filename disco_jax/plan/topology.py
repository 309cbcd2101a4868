"""TPU slices without hardware: devices to compile for, and data of each kind of chip.

The compiler is part of `libtpu`, which needs no TPU; install it with the extra `plan`.
"""

import dataclasses
import functools
import glob
import importlib.util
import math
import os
import re
from typing import Any

import jax

from disco_jax.errors import UserError, unknown


@dataclasses.dataclass(frozen=True)
class Chip:
    """Data of one chip, from Google's public tables of Cloud TPU.

    Attributes:
      flops: peak operations per second in bfloat16.
      hbm_bytes: size of the memory.
      hbm_bytes_per_s: bandwidth of the memory.
      ici_bytes_per_s: total bandwidth of the links to all neighbours, in one direction.
      clock_hz: clock of the matrix units, to convert the compiler's cycles into seconds.
      axes: number of axes of the torus that the links form.
      wrap: a side that is a multiple of this closes to a ring.
      largest: number of chips of the largest slice.
      host_bounds: chips of a host along each axis.
      config: the compiler's name of the chip configuration in which one device is one chip.
    """

    flops: float
    hbm_bytes: float
    hbm_bytes_per_s: float
    ici_bytes_per_s: float
    clock_hz: float
    axes: int
    wrap: int
    largest: int
    host_bounds: tuple[int, int, int] = (2, 2, 1)
    config: str = ""


_GB, _GIB = 1e9, 2**30
CHIPS = {
    "v4": Chip(275e12, 32 * _GIB, 1200 * _GB, 300 * _GB, 1.05e9, 3, 4, 4096, config="megacore"),
    "v5e": Chip(197e12, 16 * _GIB, 819 * _GB, 200 * _GB, 1.5e9, 2, 16, 256),
    "v5p": Chip(459e12, 95 * _GIB, 2765 * _GB, 600 * _GB, 1.75e9, 3, 4, 8960),
    "v6e": Chip(918e12, 32 * _GIB, 1640 * _GB, 448 * _GB, 1.75e9, 2, 16, 256),
}

# Values that libtpu requests from the metadata server of a TPU machine; set so that it does not
# wait for that server elsewhere.
_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Slice of chips that programs can be compiled for.

    Attributes:
      name: e.g. "v5e:4x4".
      chip: data of each chip.
      sides: sides of the torus.
      devices: one per chip.
    """

    name: str
    chip: Chip
    sides: tuple[int, ...]
    devices: tuple[jax.Device, ...]

    @property
    def hosts(self) -> int:
        """Number of machines that hold the chips."""
        return len({device.process_index for device in self.devices})


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
    """Returns the chip and the sides of a topology's name.

    Raises:
      UserError: if the name is not of the form v5e:4x4, or the chip or the slice does not exist.
    """
    kind, _, layout = name.partition(":")
    if kind not in CHIPS:
        raise unknown("The chip of --topology", kind, CHIPS)
    chip = CHIPS[kind]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", layout) or layout.count("x") != chip.axes - 1:
        example = "x".join(["4"] * chip.axes)
        raise UserError(f"--topology={name!r} needs {chip.axes} sides, e.g. {kind}:{example}.")
    sides = tuple(map(int, layout.split("x")))
    if math.prod(sides) > chip.largest:
        raise UserError(
            f"--topology={name} has {math.prod(sides)} chips; the largest {kind} slice has "
            f"{chip.largest}."
        )
    return chip, sides


def quiet() -> None:
    """Silences libtpu on machines without a TPU, where it is installed only for its compiler.

    JAX looks for a TPU whenever libtpu is installed. Call this before the first access to devices.
    """
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")
    if not chips and importlib.util.find_spec("libtpu"):
        _describe_machine()


def _describe_machine() -> None:
    for setting, value in _MACHINE.items():
        os.environ.setdefault(setting, value)


@functools.cache
def open_slice(name: str) -> Slice:
    """Opens a slice by name.

    Args:
      name: e.g. "v5e:4x4", "v4:2x2x4".

    Raises:
      UserError: if the slice does not exist, or `libtpu` is not installed.
    """
    chip, sides = parse(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "The TPU compiler is not installed. It needs no TPU: pip install 'disco-jax[plan]'."
        )
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": chip.config} if chip.config else {}
    bounds = (*sides, 1, 1)[:3]
    small = math.prod(sides) <= 8 and chip.axes == 2
    if small or any(side % part for side, part in zip(bounds, chip.host_bounds, strict=True)):
        options["chips_per_host_bounds"] = bounds  # all on one host
    _describe_machine()  # the compiler queries it again later
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={name}: the compiler reports: {error}.") from error
    return Slice(name, chip, sides, tuple(description.devices))
