"""Compare several runs: results, differing settings, curves."""

import json
from collections.abc import Sequence
from typing import Any

from disco_jax.arguments import Parser
from disco_jax.report import build, page


def main(argv: Sequence[str]) -> None:
    """Runs `disco-jax compare RUN RUN... [--output FILE]`."""
    parser = Parser("compare", __doc__)
    parser.add_argument("runs", nargs="+", help="run directories, two or more")
    parser.add_argument("--output", default="compare.html", help="path of the page")
    values = parser.read(argv)
    if values is not None:
        run(values.runs, values.output)


def run(runs: Sequence[str], output: str = "compare.html") -> dict[str, Any]:
    """Writes the page and prints its tables.

    Args:
      runs: run directories, two or more.
      output: path of the .html file.

    Returns:
      See `build.compare`.

    Raises:
      UserError: fewer than two runs, or a directory is not a run.
    """
    comparison = build.compare(runs, output)
    print(_aligned([("run", *page.RESULTS), *comparison["results"]]))
    fields = [
        (f"config.{key}", *map(json.dumps, values))
        for key, values in comparison["differences"].items()
    ]
    print("\nSettings that differ:")
    print(_aligned([("field", *comparison["runs"]), *fields]) if fields else "none")
    print(f"\nPage: {output}")
    return comparison


def _aligned(lines: Sequence[Sequence[Any]]) -> str:
    """Formats lines of cells as aligned columns; the last column is not padded."""
    cells = [[page.text(value) for value in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
