"""Self-contained HTML page: style and pictures are embedded, no scripts."""

import base64
import datetime
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from disco_jax.nested import flatten
from disco_jax.report.runs import Row, Run
from disco_jax.version import __version__

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 1240px;
  margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: 0; } h2 { font-size: 1.2em; margin-top: 2em; }
p.note, figcaption, small { color: #5c6773; font-size: 0.87em; }
table { border-collapse: collapse; margin: 0.6em 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 0.25em 0.8em;
  border-bottom: 1px solid #e1e5ea; overflow-wrap: break-word; }
td:first-child { white-space: nowrap; }
td.number { white-space: nowrap; } td.number, th.number { text-align: right; }
figure { margin: 1em 0; } img { max-width: 100%; height: auto; }
details { margin: 0.6em 0; } summary { cursor: pointer; } .wide { overflow-x: auto; }
code { font-size: 0.92em; }
"""


def page(title: str, *parts: str) -> str:
    """Builds a document from `parts`, which are HTML."""
    now = datetime.datetime.now(datetime.UTC)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n"
        f'<p class="note">disco_jax {__version__}, {now:%Y-%m-%d %H:%M} UTC</p>\n'
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Builds a heading with its content; returns "" if there is no content."""
    content = "\n".join(filter(None, parts))
    return f"<h2>{html.escape(title)}</h2>\n{content}" if content else ""


def note(remark: str) -> str:
    """Builds a small remark."""
    return f'<p class="note">{html.escape(remark)}</p>'


def folded(title: str, content: str) -> str:
    """Builds a collapsed section of HTML."""
    return f"<details>\n<summary>{html.escape(title)}</summary>\n{content}\n</details>"


def picture(png: bytes, caption: str = "") -> str:
    """Builds a figure with an embedded PNG."""
    code = base64.b64encode(png).decode("ascii")
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    name = html.escape(caption or "figure", quote=True)
    return f'<figure><img src="data:image/png;base64,{code}" alt="{name}">{below}</figure>'


def table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """Builds a table, with numbers aligned right and empty columns omitted.

    Returns "" if there are no rows.
    """
    columns = [i for i in range(len(head)) if any(line[i] not in (None, "") for line in lines)]
    head, lines = [head[i] for i in columns], [[line[i] for i in columns] for line in lines]
    if not lines:
        return ""
    numeric = [
        any(isinstance(line[i], int | float) for line in lines)
        and all(line[i] is None or isinstance(line[i], int | float) for line in lines)
        for i in range(len(head))
    ]

    def cells(tag: str, values: Sequence[Any]) -> str:
        return "".join(
            f"<{tag}{' class=number' if number else ''}>{html.escape(text(value))}</{tag}>"
            for value, number in zip(values, numeric, strict=True)
        )

    body = "\n".join(f"<tr>{cells('td', line)}</tr>" for line in lines)
    return (
        f'<div class="wide"><table>\n<thead><tr>{cells("th", head)}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def results(rows: Sequence[Row], run_name: str | None = None) -> list[list[Any]]:
    """Returns the cells of `RESULTS` for a run's results, after the run's name if it is set."""
    lines = []
    for row in rows:
        printed = row.printed
        lines.append(
            [
                *([] if run_name is None else [run_name]),
                row.title,
                row.data,
                row.step,
                row.top1,
                row.spread,
                row.top5,
                printed and printed.top1,
                printed and printed.top5,
                printed.source if printed else "",
            ]
        )
    return lines


RESULTS = (
    "evaluation", "data", "step", "top-1 (%)", "95 % or deviation", "top-5 (%)",
    "paper top-1", "paper top-5", "paper",
)  # fmt: skip


def settings(config: Mapping[str, Any]) -> str:
    """Builds a table of the resolved config, with a row per field."""
    lines = [[f"config.{key}", json.dumps(value)] for key, value in sorted(flatten(config).items())]
    return folded(f"{len(lines)} fields, as in config.json", table(("field", "value"), lines))


def environment(run: Run) -> str:
    """Builds a table of the newest start and the number of starts."""
    if not run.starts:
        return ""
    last = run.starts[-1]
    devices = last.get("devices", [])
    lines: list[tuple[str, Any]] = [
        ("starts", len(run.starts)),
        ("newest start", last.get("time")),
        ("command", " ".join(last.get("command", []))),
        ("git revision", last.get("git") or "not in a checkout"),
        ("devices", f"{len(devices)}: {', '.join(devices[:8])}" + (", ..." * (len(devices) > 8))),
        ("processes", last.get("processes")),
        ("seed", last.get("seed")),
        ("Python", last.get("python")),
        ("platform", last.get("platform")),
        ("disco_jax", last.get("disco_jax")),
        *((name, version) for name, version in last.get("packages", {}).items()),
    ]
    return table(("", "of the newest start"), [[key, text(value)] for key, value in lines])


def text(value: Any) -> str:
    """Formats the value of a cell: floats with few digits, None as ""."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1 else f"{value:.2f}"
