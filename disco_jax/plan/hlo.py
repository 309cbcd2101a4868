"""Parser for the text of programs compiled for TPUs: estimated cycles and collectives."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping

# XLA's collectives. Of an asynchronous pair, only the -start instruction is counted.
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "reduce-scatter",
    "collective-permute",
)
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64}
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OPCODE = re.compile(r"^(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\(")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind in one execution of a program.

    Attributes:
      count: number of collectives.
      bytes: total size of their results on one device.
    """

    count: int
    bytes: int


def cycles(text: str) -> float:
    """Sums the compiler's cycle estimates for one execution on one device.

    A loop counts once per iteration if the compiler knows the trip count, otherwise once. A
    conditional counts the mean of its branches, which is exact for a permutation of operations.
    Time in collectives is not included.

    Args:
      text: `compiled.as_text()`.
    """
    total = 0.0
    for line, weight in _executed(text):
        if estimate := _ESTIMATE.search(line):
            total += weight * int(estimate.group(1))
    return total


def most_expensive(text: str, count: int) -> list[tuple[float, str]]:
    """Returns the instructions with the most cycles over all their executions; see `cycles`.

    Args:
      text: `compiled.as_text()`.
      count: number of instructions.

    Returns:
      Cycles and "NAME SHAPE: name of the JAX operation", in descending order of cycles.
    """
    instructions = []
    for line, weight in _executed(text):
        if estimate := _ESTIMATE.search(line):
            source = _SOURCE.search(line)
            name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
            description = f"{name} {rest.split('{')[0]}: {source.group(1) if source else ''}"
            instructions.append((weight * int(estimate.group(1)), description))
    return sorted(instructions, key=lambda pair: -pair[0])[:count]


def collective_bytes(text: str) -> dict[str, Collective]:
    """Returns kind -> number of collectives and bytes of their results, for one execution.

    A collective that overlaps with other work appears in every fusion that carries a part of it,
    with the same chain id; it counts once.

    Args:
      text: `compiled.as_text()`.
    """
    computations, entry = _computations(text)
    totals: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    counted = set()
    fused = ((line, 1.0) for lines in computations.values() for line in lines)
    for line, weight in itertools.chain(_walk(computations, entry, 1.0), fused):
        match = _OPCODE.match(line.strip())
        if match is None:
            continue
        shape, opcode = match.groups()
        kind = opcode.removesuffix("-start")
        chain = _CHAIN.search(line)
        key = (kind, chain.group(1)) if chain else line
        if kind not in COLLECTIVES or key in counted:
            continue
        counted.add(key)
        if opcode.endswith("-start") and kind != "all-reduce":
            shape = _second(shape)  # (operands, results, ...)
        totals[kind][0] += weight
        totals[kind][1] += weight * _bytes(shape)
    return {kind: Collective(round(n), round(size)) for kind, (n, size) in sorted(totals.items())}


def _executed(text: str) -> Iterator[tuple[str, float]]:
    """Yields executed instructions and how often each runs; a fusion counts as one instruction."""
    computations, entry = _computations(text)
    yield from _walk(computations, entry, 1.0)


def _walk(
    computations: Mapping[str, list[str]], name: str, weight: float
) -> Iterator[tuple[str, float]]:
    for line in computations[name]:
        called, times = _called(line)
        if called:
            for inner in called:
                yield from _walk(computations, inner, weight * times)
        else:
            yield line, weight


def _called(line: str) -> tuple[list[str], float]:
    """Returns the computations that an instruction calls, and how often it runs each."""
    match = _OPCODE.match(line.strip())
    opcode = match.group(2) if match else ""
    if opcode == "while":
        trips = _TRIPS.search(line)
        return _names(line, "body"), float(trips.group(1)) if trips else 1.0
    if opcode == "conditional":
        branches = _names(line, "branch_computations") or [
            *_names(line, "true_computation"),
            *_names(line, "false_computation"),
        ]
        return branches, 1.0 / len(branches)
    if opcode == "call":
        return _names(line, "to_apply"), 1.0
    return [], 1.0


def _names(line: str, attribute: str) -> list[str]:
    match = re.search(attribute + r"=(\{[^}]*\}|%?[\w.\-]+)", line)
    return re.findall(r"[\w.\-]+", match.group(1)) if match else []


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns computation name -> lines, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    entry = ""
    lines: list[str] | None = None
    for line in text.splitlines():
        if line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
        elif line.endswith("{") and not line.startswith("HloModule"):
            words = line.split()
            name = words[words[0] == "ENTRY"].lstrip("%")
            computations[name] = lines = []
            entry = name if words[0] == "ENTRY" else entry
    return computations, entry


def _second(shape: str) -> str:
    """Returns the second entry of a tuple's shape."""
    depth, entries = 0, [""]
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            entries.append("")
        else:
            entries[-1] += letter
    return entries[1] if len(entries) > 1 else shape


def _bytes(shape: str) -> int:
    """Computes the bytes of an array's or a tuple's shape, without padding."""
    total = 0
    for kind, sides in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape):
        bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind) or 0)
        count = 1
        for side in filter(None, sides.split(",")):
            count *= int(side)
        total += count * bits // 8
    return total
