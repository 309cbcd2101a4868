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
from disco_jax.report import page, paper, runs
from disco_jax.sweeps.cells import TEACHER, Cell

FILES = ("table.csv", "table.html", "table.png")
# Numbers that may stand along a picture's x, in units of 2^20: of the student with its head, and of
# the teacher's backbone (0 without a teacher).
SIZES = ("parameters", "teacher_parameters")

Measured = dict[str, runs.Row]  # column -> accuracy of one cell


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
      protocols: name of an evaluation -> that of its protocol, e.g. "linear_disco".
      teacher_parameters: parameter count of the teacher's backbone; 0 without a teacher.
      cost: column -> number, see `cost`.
    """

    values: Mapping[str, Any]
    parameters: int
    scores: Mapping[str, Mapping[int, float]]
    seeds: int
    printed: Mapping[str, paper.Value]
    failed: Sequence[str] = ()
    protocols: Mapping[str, str] = dataclasses.field(default_factory=dict)
    teacher_parameters: int = 0
    cost: Mapping[str, float] = dataclasses.field(default_factory=dict)


def rows(
    cells: Sequence[Cell],
    parameters: Mapping[str, int],
    results: Mapping[str, Measured],
    failed: Mapping[str, str],
    teachers: Mapping[str, int] | None = None,
    costs: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Row]:
    """Returns a row for every combination of values except the seed's, in the order of the cells.

    Args:
      cells: cells of the sweep.
      parameters: cell -> parameter count of its student.
      results: cell -> evaluation -> its accuracy; unfinished cells are missing.
      failed: cell -> reason why it has no result.
      teachers: cell -> parameter count of its teacher; cells without one are missing.
      costs: cell -> `cost` of its student; cells without one are missing.
    """
    by_row: dict[tuple, list[Cell]] = {}
    for cell in cells:
        by_row.setdefault(cell.row, []).append(cell)
    return [
        dataclasses.replace(
            _row(row_cells, parameters, results, failed),
            teacher_parameters=(teachers or {}).get(row_cells[0].name, 0),
            cost=(costs or {}).get(row_cells[0].name, {}),
        )
        for row_cells in by_row.values()
    ]


def _row(
    row_cells: Sequence[Cell],
    parameters: Mapping[str, int],
    results: Mapping[str, Measured],
    failed: Mapping[str, str],
) -> Row:
    scores: dict[str, dict[int, float]] = {}
    printed: dict[str, paper.Value] = {}
    protocols: dict[str, str] = {}
    for cell in row_cells:
        for name, result in results.get(cell.name, {}).items():
            if result.top1 is None:
                continue
            scores.setdefault(name, {})[cell.config.seed] = result.top1
            protocols[name] = result.title
            if result.printed is not None and result.printed.row.printed:
                printed.setdefault(name, result.printed)
    first = row_cells[0]
    return Row(
        {axis: value for axis, value in first.values.items() if axis != "config.seed"},
        parameters[first.name],
        scores,
        len(row_cells),
        printed,
        [failed[cell.name] for cell in row_cells if cell.name in failed],
        protocols,
    )


def cost(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns column -> number of the results of `disco-jax cost` for one run."""
    (row,) = result["rows"]
    return {"multiply-adds (M)": row["multiply_adds"] / 1e6, "CPU ms": row["median_ms"]}


def lines(table_rows: Sequence[Row], scores: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    """Returns head and cells of the table.

    Args:
      table_rows: the rows.
      scores: names of the evaluations; each has columns for its protocol, its mean, its standard
        deviation over seeds and the paper's value, which is grey if the experiment differs.
    """
    names = _columns(table_rows, scores)
    axes = list(dict.fromkeys(axis for row in table_rows for axis in row.values))
    costs = list(dict.fromkeys(column for row in table_rows for column in row.cost))
    head = [*(axis.removeprefix("config.") for axis in axes), "parameters (M)", *costs, "seeds"]
    for name in names:
        head += [
            f"{name} protocol", f"{name} top-1 (%)", f"{name} +-", f"{name}, paper",
            f"{name}, where printed",
        ]  # fmt: skip
    head.append("remark")
    body = []
    for row in table_rows:
        finished = max((len(values) for values in row.scores.values()), default=0)
        line = [
            *(_plain(row.values.get(a, "")) for a in axes),
            row.parameters / 2**20,
            *(row.cost.get(column) for column in costs),
            f"{finished}/{row.seeds}",
        ]
        for name in names:
            values = _values(row, name)
            top1, _, source = page.printed_cells(row.printed.get(name))
            line += [
                row.protocols.get(name, ""),
                statistics.fmean(values) if values else None,
                statistics.stdev(values) if len(values) > 1 else None,
                top1,
                source,
            ]
        body.append([*line, "; ".join(dict.fromkeys(row.failed))])
    return head, body


def _columns(table_rows: Sequence[Row], scores: Sequence[str]) -> list[str]:
    """Returns the names of columns: those of evaluations, or their parts, e.g. numbers of shots."""
    measured = dict.fromkeys(name for row in table_rows for name in row.scores)
    columns = []
    for score in scores:
        parts = [name for name in measured if name.startswith(f"{score}, ")]
        columns += parts or [score]
    return columns


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
      figure: x, the axis along the picture's x ("": a bar per row) or one of `SIZES`, and score,
        the plotted evaluation.
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

    Hollow markers show the papers' values of the same experiments.

    Args:
      table_rows: the rows.
      x: an axis, or one of `SIZES`; "": a bar per row.
      score: name of an evaluation.
    """
    pyplot = plots.agg()
    figure, axes = pyplot.subplots(figsize=(9.0, 4.8), layout="constrained")
    labels = list(dict.fromkeys(_label(row, x) for row in table_rows))
    by_line: dict[str, list[Row]] = {}
    for row in table_rows:
        by_line.setdefault(_line_name(row, x), []).append(row)
    for i, (name, line_rows) in enumerate(by_line.items()):
        colour = plots.COLOURS[i % len(plots.COLOURS)]
        evaluated = [row for row in line_rows if row.scores.get(score)]
        if x in SIZES:
            evaluated = sorted(evaluated, key=lambda row: _size(row, x))
        positions = [_position(row, x, labels) for row in evaluated]
        means = [statistics.fmean(_values(row, score)) for row in evaluated]
        spreads = [_deviation(_values(row, score)) for row in evaluated]
        if x:
            style = dict(color=colour, marker=plots.MARKERS[i % len(plots.MARKERS)], capsize=3)
            axes.errorbar(positions, means, yerr=spreads, label=name or None, **style)
        else:
            axes.bar(positions, means, yerr=spreads, color=colour, capsize=3)
        with_paper_value = [row for row in line_rows if _has_value(row, score)]
        axes.plot(
            [_position(row, x, labels) for row in with_paper_value],
            [row.printed[score].top1 for row in with_paper_value],
            "o", mfc="white", color=colour if x else "#000000", ms=8,
        )  # fmt: skip
    if any(_has_value(row, score) for row in table_rows):
        axes.plot([], [], "o", mfc="white", color="#555555", label="paper")
    label_style = dict(rotation=0, ha="center") if x else dict(rotation=25, ha="right")
    if x not in SIZES:
        axes.set_xticks(range(len(labels)), labels, rotation_mode="anchor", **label_style)
    unit = " (M)" if x in SIZES else ""
    axes.set(xlabel=x.removeprefix("config.") + unit, ylabel=f"{score} top-1 (%)")
    axes.margins(x=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    pyplot.close(figure)
    return stream.getvalue()


def _size(row: Row, x: str) -> float:
    """Returns one of `SIZES` of a row, in units of 2^20."""
    return (row.parameters if x == SIZES[0] else row.teacher_parameters) / 2**20


def _position(row: Row, x: str, labels: Sequence[str]) -> float:
    """Returns the place of a row along x."""
    return _size(row, x) if x in SIZES else labels.index(_label(row, x))


def _has_value(row: Row, score: str) -> bool:
    """Returns whether a paper has a top-1 of the same experiment."""
    value = row.printed.get(score)
    return value is not None and not value.differences and value.top1 is not None


def _label(row: Row, x: str) -> str:
    """Returns the label of a row along x."""
    return _plain(row.values.get(x, "")) if x else ", ".join(map(_plain, row.values.values()))


def _line_name(row: Row, x: str) -> str:
    """Returns the name of a row's line in the plot."""
    along = (x, TEACHER) if x == SIZES[1] else (x,)
    named = [_plain(value) for axis, value in row.values.items() if axis not in along]
    return ", ".join(named) if x else ""


def _values(row: Row, score: str) -> list[float]:
    """Returns a row's scores, one per seed."""
    return list(row.scores.get(score, {}).values())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _number(value: Any) -> Any:
    return (
        ""
        if value is None or isinstance(value, page.Grey)
        else round(value, 4)
        if isinstance(value, float)
        else value
    )


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
