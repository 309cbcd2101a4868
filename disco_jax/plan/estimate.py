"""Step times, rates and their scaling with the number of chips, from a compiled step."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from disco_jax.plan import hlo, topology
from disco_jax.plan.program import Program

# Minimum latency of a collective in seconds, for each hop between neighbours.
_HOP_S = 1e-6
# Collectives whose size grows with the global batch: every chip receives rows from all others. The
# other collectives carry parameters or a chip's own rows, whose size is independent of the number
# of chips.
_GROWING = ("all-gather",)
# Bytes of a collective that cross a chip's links, as a multiple of its result's size.
_LINK_FACTORS = {"all-reduce": 2.0}
# Collectives with point-to-point traffic, whose bytes cross every link on their route.
_POINT_TO_POINT = ("all-to-all", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Times:
    """Times of one step, in seconds.

    Attributes:
      floor: lower bound for any program with these operations: matrix units at their peak, or
        memory read and written once, whichever takes longer.
      compute: from the compiler's cycle estimate.
      collectives: time on the links, without overlap with computation.
    """

    floor: float
    compute: float
    collectives: float

    @property
    def step(self) -> float:
        """Expected time of the step."""
        return max(self.floor, self.compute) + self.collectives


def times(program: Program, tpu_slice: topology.Slice) -> Times:
    """Estimates the time of a step on a slice."""
    chip = tpu_slice.chip
    floor = max(program.flops / chip.flops, program.streamed / chip.hbm_bytes_per_s)
    return Times(
        floor,
        program.cycles / chip.clock_hz,
        collective_s(program.collectives, chip, tpu_slice.sides),
    )


def collective_s(
    collectives: Mapping[str, hlo.Collective], chip: topology.Chip, sides: Sequence[int]
) -> float:
    """Estimates the seconds that the collectives of a step take on a torus, one after the other.

    A ring of n chips sends (n - 1) / n of the result over each link, twice for an all-reduce. The
    traffic is spread over all axes; an axis that does not close to a ring has half the bandwidth.
    Point-to-point traffic crosses, on average, a quarter of a ring or a third of a line along each
    axis.
    """
    count = math.prod(sides)
    if count == 1:
        return 0.0
    axes = [0.0 if side == 1 else (1.0 if side % chip.wrap == 0 else 0.5) for side in sides]
    rate = chip.ici_bytes_per_s * sum(axes) / chip.axes
    hops = sum(side // 2 for side in sides)
    rings = [side % chip.wrap == 0 for side in sides]
    route = sum(
        side / 4 if ring else (side**2 - 1) / (3 * side)
        for side, ring in zip(sides, rings, strict=True)
    )
    # The result of a reduce-scatter is one part of the bytes that circulate.
    link_factors = {
        **_LINK_FACTORS,
        "reduce-scatter": count,
        **dict.fromkeys(_POINT_TO_POINT, route),
    }
    total_bytes = sum(link_factors.get(kind, 1.0) * c.bytes for kind, c in collectives.items())
    total_count = sum(c.count for c in collectives.values())
    return total_bytes * (count - 1) / count / rate + total_count * hops * _HOP_S


def scaled(
    collectives: Mapping[str, hlo.Collective], before: int, after: int
) -> dict[str, hlo.Collective]:
    """Scales the collectives to another number of chips with the same batch size per chip."""
    return {
        kind: dataclasses.replace(c, bytes=c.bytes * after // before) if kind in _GROWING else c
        for kind, c in collectives.items()
    }


def efficiency(
    program: Program, measured_on: int, chip: topology.Chip, sides: Sequence[int]
) -> float:
    """Estimates a chip's throughput on a slice, relative to a single chip.

    Assumes that collectives do not overlap with computation, so the true efficiency is higher.
    """
    chips = math.prod(sides)
    floor = max(program.flops / chip.flops, program.streamed / chip.hbm_bytes_per_s)
    single_s = max(floor, program.cycles / chip.clock_hz)
    return single_s / (
        single_s + collective_s(scaled(program.collectives, measured_on, chips), chip, sides)
    )


def shapes(chip: topology.Chip, count: int) -> tuple[int, ...]:
    """Returns the sides of the squarest slice of `count` chips, a power of two."""
    power = count.bit_length() - 1
    return tuple(2 ** ((power + i) // chip.axes) for i in range(chip.axes))


def largest(fits: Callable[[int], bool], candidates: Sequence[int]) -> int:
    """Returns the largest of ascending `candidates` that fits, by bisection; 0 if none fits."""
    low, high = -1, len(candidates)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(candidates[middle]) else (low, middle)
    return candidates[low] if low >= 0 else 0
