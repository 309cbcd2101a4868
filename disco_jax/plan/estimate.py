"""From a compiled step to hours: times, rates, and how they change with the number of chips."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from disco_jax.plan import hlo, topology
from disco_jax.plan.program import Program

# Seconds that a collective takes at least, whatever it carries, for each neighbour it passes.
_HOP_S = 1e-6
# What grows with the global batch: rows that every chip gets from all others. The others carry
# parameters or a chip's own rows, which are as many on any number of chips.
_GROWING = ("all-gather",)
# Bytes of one collective that cross a chip's links, as a multiple of its result.
_PASSES = {"all-reduce": 2.0}
# Bytes go from each chip to its own target and cross every link on the way there.
_TRAVELS = ("all-to-all", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Times:
    """Of one step, in seconds.

    Attributes:
      floor: no program of these operations can be faster: matrix units at their peak, or memory
        read and written once, whichever takes longer.
      compute: by the compiler's cycles.
      collectives: on the links, as if nothing ran beside them.
    """

    floor: float
    compute: float
    collectives: float

    @property
    def step(self) -> float:
        """What to expect."""
        return max(self.floor, self.compute) + self.collectives


def times(program: Program, where: topology.Slice) -> Times:
    """How long a step takes on a slice."""
    chip = where.chip
    floor = max(program.flops / chip.flops, program.streamed / chip.hbm_bytes_per_s)
    return Times(
        floor,
        program.cycles / chip.clock_hz,
        collective_s(program.collectives, chip, where.sides),
    )


def collective_s(
    collectives: Mapping[str, hlo.Collective], chip: topology.Chip, sides: Sequence[int]
) -> float:
    """Seconds that the collectives of a step take on a torus, one after the other.

    A ring through n chips passes (n - 1) / n of what it makes over each link, twice for an
    all-reduce. All axes carry a share; an axis that does not close to a ring carries half. What has
    one target travels, on average, a quarter of a ring or a third of a line along each axis.
    """
    count = math.prod(sides)
    if count == 1:
        return 0.0
    axes = [0.0 if side == 1 else (1.0 if side % chip.wrap == 0 else 0.5) for side in sides]
    rate = chip.ici_bytes_per_s * sum(axes) / chip.axes
    hops = sum(side // 2 for side in sides)
    rings = [side % chip.wrap == 0 for side in sides]
    way = sum(
        side / 4 if ring else (side**2 - 1) / (3 * side)
        for side, ring in zip(sides, rings, strict=True)
    )
    # A reduce-scatter makes one part of what goes around.
    passes = {**_PASSES, "reduce-scatter": count, **dict.fromkeys(_TRAVELS, way)}
    carried = sum(passes.get(kind, 1.0) * c.bytes for kind, c in collectives.items())
    started = sum(c.count for c in collectives.values())
    return carried * (count - 1) / count / rate + started * hops * _HOP_S


def scaled(
    collectives: Mapping[str, hlo.Collective], before: int, after: int
) -> dict[str, hlo.Collective]:
    """The collectives on another number of chips with as many images each."""
    return {
        kind: dataclasses.replace(c, bytes=c.bytes * after // before) if kind in _GROWING else c
        for kind, c in collectives.items()
    }


def efficiency(
    program: Program, measured_on: int, chip: topology.Chip, sides: Sequence[int]
) -> float:
    """Images a second of a chip on a slice of these sides, as a share of those of a lone one.

    Collectives hide behind nothing, so the true share lies above it.
    """
    after = math.prod(sides)
    floor = max(program.flops / chip.flops, program.streamed / chip.hbm_bytes_per_s)
    alone = max(floor, program.cycles / chip.clock_hz)
    return alone / (
        alone + collective_s(scaled(program.collectives, measured_on, after), chip, sides)
    )


def shapes(chip: topology.Chip, count: int) -> tuple[int, ...]:
    """The sides of the squarest slice of `count` chips, a power of two."""
    power = count.bit_length() - 1
    return tuple(2 ** ((power + i) // chip.axes) for i in range(chip.axes))


def largest(fits: Callable[[int], bool], candidates: Sequence[int]) -> int:
    """The last of ascending `candidates` that fits, by bisection; 0 if not even the first does."""
    low, high = -1, len(candidates)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(candidates[middle]) else (low, middle)
    return candidates[low] if low >= 0 else 0
