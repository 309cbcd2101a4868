"""Results of a sweep: a row for all seeds of a cell, as CSV, HTML page and picture."""

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
    """Cells that differ only in their seed.

    Attributes:
      values: axis -> value.
      parameters: parameter count of the student with its head.
      scores: name of an evaluation -> seed -> top-1 in percent, of the evaluated seeds.
      seeds: planned number of seeds.
      printed: name of an evaluation -> the paper's result.
      failed: reasons why seeds have no result, e.g. a non-finite loss.
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
    """Returns a row for every combination of values except the seed's, in the order of the cells.

    Args:
      cells: cells of the sweep.
      parameters: cell -> parameter count of its student.
      results: cell -> evaluation -> its result; unfinished cells are missing.
      failed: cell -> reason why it has no result.
    """
    by_row: dict[tuple, list[Cell]] = {}
    for cell in cells:
        by_row.setdefault(cell.row, []).append(cell)
    return [_row(row_cells, parameters, results, failed) for row_cells in by_row.values()]


def _row(row_cells, parameters, results, failed) -> Row:
    scores: dict[str, dict[int, float]] = {}
    for cell in row_cells:
        for name, result in results.get(cell.name, {}).items():
            scores.setdefault(name, {})[cell.config.seed] = result["top1"]
    first = row_cells[0]
    printed = paper.values(first.config.to_dict())
    return Row(
        {axis: value for axis, value in first.values.items() if axis != "config.seed"},
        parameters[first.name],
        scores,
        len(row_cells),
        {name: printed[paper.kind(name)] for name in scores if paper.kind(name) in printed},
        [failed[cell.name] for cell in row_cells if cell.name in failed],
    )


def lines(table_rows: Sequence[Row], scores: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    """Returns head and cells of the table.

    Args:
      table_rows: the rows.
      scores: names of the evaluations; each has columns for its mean, its standard deviation over
        seeds and the paper's value.
    """
    axes = list(dict.fromkeys(axis for row in table_rows for axis in row.values))
    head = [*(axis.removeprefix("config.") for axis in axes), "parameters (M)", "seeds"]
    for name in scores:
        head += [f"{name} top-1 (%)", f"{name} +-", f"{name}, paper", f"{name}, where printed"]
    head.append("remark")
    body = []
    for row in table_rows:
        finished = max((len(values) for values in row.scores.values()), default=0)
        line = [
            *(_plain(row.values.get(a, "")) for a in axes),
            row.parameters / 2**20,
            f"{finished}/{row.seeds}",
        ]
        for name in scores:
            values, printed = _values(row, name), row.printed.get(name)
            line += [
                statistics.fmean(values) if values else None,
                statistics.stdev(values) if len(values) > 1 else None,
                printed and printed.top1,
                printed.source if printed else "",
            ]
        body.append([*line, "; ".join(dict.fromkeys(row.failed))])
    return head, body


def write(
    folder: epath.Path,
    name: str,
    table_rows: Sequence[Row],
    scores: Sequence[str],
    figure: Any,
    *above: str,
) -> None:
    """Writes `FILES` into a folder.

    Args:
      folder: directory of the sweep.
      name: name of the sweep.
      table_rows: the rows.
      scores: names of the evaluations.
      figure: x, the axis along the picture's x ("": a bar per row), and score, the plotted
        evaluation.
      above: HTML above the table.
    """
    head, cells = lines(table_rows, scores)
    png = draw(table_rows, figure.x, figure.score)
    contents = {
        "table.csv": text(head, cells),
        "table.png": png,
        "table.html": page.page(
            f"Sweep: {name}",
            *above,
            page.section("Results", page.table(head, cells)),
            page.section("Picture", page.picture(png)),
        ).encode(),
    }
    for file, content in contents.items():
        with whole(folder / file) as unfinished:
            unfinished.write_bytes(content)


def text(head: Sequence[str], cells: Sequence[Sequence[Any]]) -> bytes:
    """Formats a table as CSV."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([head, *([_number(value) for value in line] for line in cells)])
    return stream.getvalue().encode()


def draw(table_rows: Sequence[Row], x: str, score: str) -> bytes:
    """Plots top-1 along an axis, with a line per combination of the other axes.

    Hollow markers show the papers' values.

    Args:
      table_rows: the rows.
      x: an axis; "": a bar per row.
      score: name of an evaluation.
    """
    pyplot = plots.agg()
    figure, axes = pyplot.subplots(figsize=(9.0, 4.8), layout="constrained")
    places = list(dict.fromkeys(_label(row, x) for row in table_rows))
    by_line: dict[str, list[Row]] = {}
    for row in table_rows:
        by_line.setdefault(_line_name(row, x), []).append(row)
    for i, (name, line_rows) in enumerate(by_line.items()):
        colour = plots.COLOURS[i % len(plots.COLOURS)]
        evaluated = [row for row in line_rows if row.scores.get(score)]
        positions = [places.index(_label(row, x)) for row in evaluated]
        means = [statistics.fmean(_values(row, score)) for row in evaluated]
        spreads = [_deviation(_values(row, score)) for row in evaluated]
        if x:
            style = dict(color=colour, marker=plots.MARKERS[i % len(plots.MARKERS)], capsize=3)
            axes.errorbar(positions, means, yerr=spreads, label=name or None, **style)
        else:
            axes.bar(positions, means, yerr=spreads, color=colour, capsize=3)
        with_paper_value = [row for row in line_rows if score in row.printed]
        axes.plot(
            [places.index(_label(row, x)) for row in with_paper_value],
            [row.printed[score].top1 for row in with_paper_value],
            "o", mfc="white", color=colour if x else "#000000", ms=8,
        )  # fmt: skip
    if any(score in row.printed for row in table_rows):
        axes.plot([], [], "o", mfc="white", color="#555555", label="paper")
    label_style = dict(rotation=0, ha="center") if x else dict(rotation=25, ha="right")
    axes.set_xticks(range(len(places)), places, rotation_mode="anchor", **label_style)
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
    """Returns the label of a row along x."""
    return _plain(row.values.get(x, "")) if x else ", ".join(map(_plain, row.values.values()))


def _line_name(row: Row, x: str) -> str:
    """Returns the name of a row's line in the plot."""
    return ", ".join(_plain(value) for axis, value in row.values.items() if axis != x) if x else ""


def _values(row: Row, score: str) -> list[float]:
    """Returns a row's scores, one per seed."""
    return list(row.scores.get(score, {}).values())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _number(value: Any) -> Any:
    return "" if value is None else round(value, 4) if isinstance(value, float) else value


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
