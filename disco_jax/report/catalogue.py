"""Lists of the papers' tables and cells: what runs, what is missing, and the printed values."""

from collections.abc import Iterable, Sequence
from typing import Any

from disco_jax.report import rows
from disco_jax.report.rows import Row, Table

HEADER = """# The papers' tables and figures, cell by cell

This page is generated: `disco-jax reproduce --markdown > docs/reproduce.md`.

`disco-jax reproduce` lists the tables, `disco-jax reproduce disco/table1` the cells of one. With a
directory it trains a cell's student and evaluates it by the paper's protocol; a second start
resumes, and skips what is finished:

```bash
disco-jax reproduce disco/table1/resnet18/resnet50 --dry-run
disco-jax reproduce disco/table1/resnet18/resnet50 --teacher runs/moco_v2 --workdir runs/cell
```

`--dry-run` prints the settings and the weights that the cell needs, with `--topology v5e:2x4` also
the hours on a TPU slice. `--config.FIELD=VALUE` changes any field, for example `config.data.dir`.
A printed value appears beside a measured one only if all settings that define the experiment are
equal, the teacher was pre-trained in the same way and the evaluation follows the same protocol. On
pages, values of other experiments are grey, and a tooltip says what differs. What a run cannot
prove, for example how a teacher's file was pre-trained, is listed as assumed.
Accuracies are in percent. No value of ours on ImageNet has been measured yet.
"""


def overview() -> str:
    """Returns a line per table: id, number of cells that run, title."""
    lines = [[entry.id, _count(entry), entry.title] for entry in rows.tables().values()]
    cells = list(rows.rows().values())
    running = sum(row.state == rows.RUNS for row in cells)
    return (
        f"{_aligned(lines)}\n{running} of {len(cells)} cells run. `disco-jax reproduce TABLE` "
        "lists the cells of a table."
    )


def listing(cells: Iterable[Row]) -> str:
    """Returns a line per cell: id, printed value, state."""
    return _aligned([[row.id, printed(row), state(row)] for row in cells])


def printed(row: Row) -> str:
    """Formats the printed values of a cell, e.g. "60.6 / 83.7"; "-" if there are none."""
    # Percentages as the papers print them; numbers of parameters have more digits.
    values = (f"{v:g}" if name == "parameters" else f"{v:.1f}" for name, v in row.printed.items())
    return " / ".join(values) or "-"


def state(row: Row) -> str:
    """Formats whether a cell runs, or what it lacks."""
    if row.missing:
        return f"missing: {row.missing}"
    return row.command or rows.RUNS


def settings(row: Row) -> list[str]:
    """Returns the lines that describe how a cell is trained and scored."""
    lines = [f"printed: {printed(row)} ({row.source})", f"state: {state(row)}"]
    if row.recipe:
        lines.append(f"recipe: {row.recipe}{_changes(row.changes)}")
    if row.teacher:
        lines.append(f"teacher: {_teacher(row)}")
    if row.evaluation:
        lines.append(f"evaluation: {row.evaluation.reference}{_changes(row.evaluation.changes)}")
    return lines + ([f"note: {row.note}"] if row.note else [])


def markdown() -> str:
    """Returns docs/reproduce.md."""
    parts = [HEADER]
    parts += [_table(entry) for entry in rows.tables().values()]
    return "\n".join(parts)


def _table(entry: Table) -> str:
    """Returns the section of a table."""
    lines = [f"## `{entry.id}`", "", f"{entry.title}. {_count(entry)}.", ""]
    if all(row.missing for row in entry.rows) and len({row.missing for row in entry.rows}) == 1:
        lines += [f"Missing: {entry.rows[0].missing}.", ""]
    lines += ["| cell | printed | trained and scored by |", "|---|---|---|"]
    for row in entry.rows:
        cell = row.id.removeprefix(f"{entry.id}/")
        lines.append(f"| `{cell}` | {printed(row)} | {_how(row)} |")
    return "\n".join([*lines, ""])


def _how(row: Row) -> str:
    """Returns recipe and evaluation of a cell, or what is missing."""
    if row.missing:
        return f"missing: {row.missing}"
    if row.command:
        return f"`{row.command}`" + (f" ({row.note})" if row.note else "")
    parts = [f"`{row.recipe}{_changes(row.changes)}`"]
    if row.teacher:
        parts.append(row.teacher.about)
    if row.evaluation:
        parts.append(f"`{row.evaluation.reference}`")
    return "; ".join([*parts, *([row.note] if row.note else [])])


def _teacher(row: Row) -> str:
    teacher = row.teacher
    assert teacher is not None
    text = f"{teacher.backbone}, {teacher.about}"
    text += f", top-1 {teacher.top1:g} %" if teacher.top1 else ""
    text += f", published as {teacher.file}" if teacher.file else ""
    return text + (f", trained by `disco-jax reproduce {teacher.row}`" if teacher.row else "")


def _changes(changes: Sequence[tuple[str, Any]]) -> str:
    """Formats changed fields as flags."""
    return "".join(f" --config.{field}={_flag(value)}" for field, value in changes)


def _flag(value: Any) -> str:
    return f'"{value}"' if isinstance(value, tuple) else str(value)


def _count(entry: Table) -> str:
    running = sum(row.state == rows.RUNS for row in entry.rows)
    return f"{running} of {len(entry.rows)} run"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
