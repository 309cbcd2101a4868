"""What a sweep came to: a row for all seeds of a cell, as CSV, page and picture."""

import csv
import dataclasses
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from disco_jax.evaluate import plots
from disco_jax.files import whole
from disco_jax.report import page, paper
from disco_jax.sweeps.cells import Cell

FILES = ("table.csv", "table.html", "table.png")


@dataclasses.dataclass(frozen=True)
class Row:
    """Cells that differ in their seed alone.

    Attributes:
      values: axis -> value.
      parameters: of the student with its head.
      scores: name of an evaluation -> seed -> top-1 in percent, of seeds that were evaluated.
      seeds: how many there are to be.
      printed: name of an evaluation -> what a paper says.
      failed: why, of the seeds that are not finite.
    """

    values: Mapping[str, Any]
    parameters: int
    scores: Mapping[str, Mapping[int, float]]
    seeds: int
    printed: Mapping[str, paper.Value]
    failed: Sequence[str] = ()


def rows(
    cells: Sequence[Cell],
    parameters: Mapping[str, int],
    results: Mapping[str, Mapping[str, Mapping[str, Any]]],
    failed: Mapping[str, str],
) -> list[Row]:
    """A row for every combination of values but the seed's, in the order of the cells.

    Args:
      cells: of the sweep.
      parameters: cell -> of its student.
      results: cell -> evaluation -> what it wrote; cells that are not there are not done.
      failed: cell -> why it has no result.
    """
    by_row: dict[tuple, list[Cell]] = {}
    for cell in cells:
        by_row.setdefault(cell.row, []).append(cell)
    return [_row(mine, parameters, results, failed) for mine in by_row.values()]


def _row(mine, parameters, results, failed) -> Row:
    scores: dict[str, dict[int, float]] = {}
    for cell in mine:
        for name, found in results.get(cell.name, {}).items():
            scores.setdefault(name, {})[cell.config.seed] = found["top1"]
    first = mine[0]
    printed = paper.values(first.config.to_dict())
    return Row(
        {axis: value for axis, value in first.values.items() if axis != "config.seed"},
        parameters[first.name],
        scores,
        len(mine),
        {name: printed[paper.kind(name)] for name in scores if paper.kind(name) in printed},
        [failed[cell.name] for cell in mine if cell.name in failed],
    )


def lines(found: Sequence[Row], scores: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    """Head and cells of the table.

    Args:
      found: the rows.
      scores: the evaluations, each a column, with its spread over seeds and the paper's value.
    """
    axes = list(dict.fromkeys(axis for row in found for axis in row.values))
    head = [*(axis.removeprefix("config.") for axis in axes), "parameters (M)", "seeds"]
    for name in scores:
        head += [f"{name} top-1 (%)", f"{name} +-", f"{name}, paper", f"{name}, where printed"]
    head.append("remark")
    made = []
    for row in found:
        done = max((len(values) for values in row.scores.values()), default=0)
        line = [
            *(_plain(row.values.get(a, "")) for a in axes),
            row.parameters / 2**20,
            f"{done}/{row.seeds}",
        ]
        for name in scores:
            values, printed = _values(row, name), row.printed.get(name)
            line += [
                statistics.fmean(values) if values else None,
                statistics.stdev(values) if len(values) > 1 else None,
                printed and printed.top1,
                printed.source if printed else "",
            ]
        made.append([*line, "; ".join(dict.fromkeys(row.failed))])
    return head, made


def write(
    folder: epath.Path,
    name: str,
    found: Sequence[Row],
    scores: Sequence[str],
    figure: Any,
    *above: str,
) -> None:
    """Writes `FILES` to a folder.

    Args:
      folder: of the sweep.
      name: of the sweep.
      found: the rows.
      scores: names of the evaluations.
      figure: x, the axis along the picture's x ("": a bar a row), and score, what is drawn.
      above: HTML above the table.
    """
    head, cells = lines(found, scores)
    png = draw(found, figure.x, figure.score)
    made = {
        "table.csv": text(head, cells),
        "table.png": png,
        "table.html": page.page(
            f"Sweep: {name}",
            *above,
            page.section("Results", page.table(head, cells)),
            page.section("Picture", page.picture(png)),
        ).encode(),
    }
    for file, content in made.items():
        with whole(folder / file) as unfinished:
            unfinished.write_bytes(content)


def text(head: Sequence[str], cells: Sequence[Sequence[Any]]) -> bytes:
    """A table as CSV."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([head, *([_number(value) for value in line] for line in cells)])
    return stream.getvalue().encode()


def draw(found: Sequence[Row], x: str, score: str) -> bytes:
    """Top-1 along an axis, a line for every other combination, a hollow mark for a paper's value.

    Args:
      found: the rows.
      x: an axis; "": a bar a row.
      score: name of an evaluation.
    """
    pyplot = plots.agg()
    figure, axes = pyplot.subplots(figsize=(9.0, 4.8), layout="constrained")
    places = list(dict.fromkeys(_label(row, x) for row in found))
    by_line: dict[str, list[Row]] = {}
    for row in found:
        by_line.setdefault(_rest(row, x), []).append(row)
    for i, (name, mine) in enumerate(by_line.items()):
        colour = plots.COLOURS[i % len(plots.COLOURS)]
        done = [row for row in mine if row.scores.get(score)]
        at = [places.index(_label(row, x)) for row in done]
        means = [statistics.fmean(_values(row, score)) for row in done]
        spreads = [_spread(_values(row, score)) for row in done]
        if x:
            style = dict(color=colour, marker=plots.MARKERS[i % len(plots.MARKERS)], capsize=3)
            axes.errorbar(at, means, yerr=spreads, label=name or None, **style)
        else:
            axes.bar(at, means, yerr=spreads, color=colour, capsize=3)
        said = [row for row in mine if score in row.printed]
        axes.plot(
            [places.index(_label(row, x)) for row in said],
            [row.printed[score].top1 for row in said],
            "o", mfc="white", color=colour if x else "#000000", ms=8,
        )  # fmt: skip
    if any(score in row.printed for row in found):
        axes.plot([], [], "o", mfc="white", color="#555555", label="paper")
    turned = dict(rotation=0, ha="center") if x else dict(rotation=25, ha="right")
    axes.set_xticks(range(len(places)), places, rotation_mode="anchor", **turned)
    axes.set(xlabel=x.removeprefix("config."), ylabel=f"{score} top-1 (%)")
    axes.margins(x=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    pyplot.close(figure)
    return stream.getvalue()


def _label(row: Row, x: str) -> str:
    """Where a row stands along x."""
    return _plain(row.values.get(x, "")) if x else ", ".join(map(_plain, row.values.values()))


def _rest(row: Row, x: str) -> str:
    """What a line stands for."""
    return ", ".join(_plain(value) for axis, value in row.values.items() if axis != x) if x else ""


def _values(row: Row, score: str) -> list[float]:
    """A score, a value a seed."""
    return list(row.scores.get(score, {}).values())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _number(value: Any) -> Any:
    return "" if value is None else round(value, 4) if isinstance(value, float) else value


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
