"""A run's report and the comparison of several: read, drawn, written."""

import contextlib
import dataclasses
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from disco_jax import errors
from disco_jax.files import whole
from disco_jax.nested import flatten
from disco_jax.report import figures, page, runs
from disco_jax.report.runs import Run
from disco_jax.train import events

_LOG = logging.getLogger(__name__)

_SHOWN_CLASSES = 5  # at each end
FILE = "report.html"
SHEET = "views"
_TITLES = {
    "losses": "Losses",
    "knn": "Does it learn: accuracy while training (%)",
    "health": "Health",
    "rates": "Rates",
    "speed": "Throughput",
}
_PARTS = {
    "init": "everything before the first step but compiling",
    "compile": "compiling",
    "data": "waiting for images",
    "step": "steps",
    "eval": "evaluations while training",
    "save": "waiting for checkpoints",
    "lost": "steps done again after an interruption",
}


def refresh(wanted: bool, workdir: str) -> None:
    """Writes the report of a run at the end of a task; no failure of it ends the task.

    Args:
      wanted: the config's switch.
      workdir: of the run.
    """
    if wanted and not jax.process_index():
        with optional("report"):
            print(f"Report: {write(workdir)}", flush=True)


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """What fails inside is told and no more: hours of training stand above a picture of them."""
    try:
        yield
    except Exception as error:
        _LOG.warning("No %s was made: %s: %s", what, type(error).__name__, error)


def write(workdir: str) -> epath.Path:
    """Writes report.html and figures/*.png of the run in `workdir`.

    Returns:
      The path of the page.

    Raises:
      UserError: there is no run.
    """
    run = runs.read(workdir)
    drawn = _drawn(run)
    folder = run.path / runs.FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in drawn.items():
        _put(folder / f"{name}.png", png)
    sheet = folder / f"{SHEET}.png"
    views = sheet.read_bytes() if sheet.exists() else None
    with whole(run.path / FILE) as file:
        file.write_text(_page(run, drawn, views))
    if run.config.get("log", {}).get("tensorboard") and "://" not in str(run.path):
        _tensorboard(run, drawn)
    return run.path / FILE


def _tensorboard(run: Run, drawn: Mapping[str, bytes]) -> None:
    """The evaluations for TensorBoard: results, trainings, pictures; in one file, made anew.

    The metrics of the run itself and its contact sheet were written as they came.
    """
    last = int(run.metrics[-1]["step"]) if run.metrics else 0
    with (
        whole(run.path / f"{events.PREFIX}report") as file,
        contextlib.closing(events.Events(file)) as board,
    ):
        for row in runs.rows(run):
            values = {"top1": row.top1, "top5": row.top5}
            known = {f"{row.name}/{key}": x for key, x in values.items() if x is not None}
            board.scalars(last if row.step is None else row.step, known)
        for name, lines in run.trainings.items():
            for line in lines:
                told = {f"{name}/{key}": x for key, x in line.items() if key != "step"}
                board.scalars(int(line["step"]), told)
        for name, png in drawn.items():
            board.image(last, f"report/{name}", png)
        for name, picture in run.pictures.items():
            board.image(last, f"report/{name}", picture.read_bytes())


def keep_sheet(workdir: str, image: np.ndarray) -> None:
    """Keeps a contact sheet, u8[H, W, 3], for the reports to come."""
    folder = epath.Path(workdir) / runs.FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG")
    _put(folder / f"{SHEET}.png", stream.getvalue())


def compare(paths: Sequence[str], output: str) -> dict[str, Any]:
    """Writes one page for several runs.

    Args:
      paths: of run directories, two or more.
      output: an .html file.

    Returns:
      {"runs": names, "differences": field -> value of each run, "results": lines of cells with
      `page.RESULTS` behind the run's name}.

    Raises:
      UserError: fewer than two runs, or a directory that is none.
    """
    if len(paths) < 2:
        raise errors.UserError("Give two run directories or more to compare.")
    found = [runs.read(path) for path in paths]
    names = _names(found)
    fields = differing([run.config for run in found])
    lines = [
        line
        for run, name in zip(found, names, strict=True)
        for line in page.results(runs.rows(run) or [runs.Row("none yet")], name)
    ]
    every = list(dict.fromkeys(key for run in found for key in run.keys))
    shared = [key for key in every if all(key in run.keys for run in found)]
    drawn = {
        title: figures.curves(found, mine)
        for title, keys in (("losses", every), ("knn", every), ("health", shared))
        if (mine := figures.of_group(keys, title))
    }
    target = epath.Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole(target) as file:
        file.write_text(
            page.page(
                f"{len(found)} runs compared",
                page.section("Results", page.table(("run", *page.RESULTS), lines)),
                page.section("At the end", page.table(*_ends(found, names, every))),
                page.section(
                    "Settings that differ",
                    page.table(
                        ("field", *names),
                        [[f"config.{key}", *map(json.dumps, row)] for key, row in fields.items()],
                    )
                    or page.note("None."),
                ),
                *(page.section(_TITLES[key], page.picture(png)) for key, png in drawn.items()),
            )
        )
    return {"runs": names, "differences": fields, "results": lines}


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Field -> its value in every config, for the fields that are not the same in all."""
    flat = [flatten(config) for config in configs]
    keys = sorted(set().union(*flat))
    rows = {key: [one.get(key, "(absent)") for one in flat] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def _names(found: Sequence[Run]) -> list[str]:
    """Of the directories; their paths where those are not told apart."""
    names = [run.name for run in found]
    return names if len(set(names)) == len(names) else [str(run.path) for run in found]


def _ends(found: Sequence[Run], names: Sequence[str], keys: Sequence[str]) -> Any:
    """Head and lines of the newest values of metrics."""
    shown = [key for key in keys if figures.group(key) in ("losses", "knn", "speed")]
    steps = ["step", *(run.metrics[-1]["step"] if run.metrics else None for run in found)]
    return ("", *names), [steps, *([key, *(run.last(key) for run in found)] for key in shown)]


def _drawn(run: Run) -> dict[str, bytes]:
    """Figure -> PNG."""
    made = {}
    for name in _TITLES:
        if keys := figures.of_group(run.keys, name):
            made[name] = figures.curves([run], keys)
    if sum(run.seconds.values()) > 0:
        made["times"] = figures.times(run.seconds)
    for name, lines in run.trainings.items():
        of_it = dataclasses.replace(run, metrics=lines)
        groups = (figures.of_group(of_it.keys, group) for group in ("losses", "knn", "rates"))
        if keys := [key for group in groups for key in group]:
            made[f"training_{name}"] = figures.curves([of_it], keys)
    for name in run.results:
        stored = run.path / f"{name}.npz"
        if not stored.exists():
            continue
        with stored.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            table = arrays["confusion"] if "confusion" in arrays.files else None
        if table is not None and (png := figures.confusion(table)):
            made[f"confusion_{name}"] = png
    return made


def _page(run: Run, drawn: Mapping[str, bytes], views: bytes | None) -> str:
    pictures = {name: page.picture(drawn[name]) for name in _TITLES if name in drawn}
    further = [
        page.picture(png, f"{name.removeprefix(prefix)}: {what}")
        for prefix, what in (("training_", "its training"), ("confusion_", "where each class went"))
        for name, png in drawn.items()
        if name.startswith(prefix)
    ]
    return page.page(
        f"{run.config.get('name') or 'Run'}: {run.name}",
        page.table(("", ""), _summary(run)),
        page.section(
            "Results",
            page.table(page.RESULTS, page.results(runs.rows(run))),
            page.table(("evaluation", "weakest classes", "best classes"), _classes(run)),
            page.table(("network", "parameters (M)", "multiply-adds (M)", "CPU ms"), _cost(run)),
        ),
        *(
            page.section(_TITLES[name], picture)
            for name, picture in pictures.items()
            if name != "speed"
        ),
        page.section("What the networks see", _sheet(run, views)),
        page.section(
            "Pictures",
            *(page.picture(file.read_bytes(), name) for name, file in run.pictures.items()),
            *further,
        ),
        page.section("Where the time went", *_time(run, drawn), pictures.get("speed", "")),
        page.section("Settings", page.settings(run.config)),
        page.section("Environment", page.environment(run)),
    )


def _summary(run: Run) -> list[list[str]]:
    config, lines = run.config, [["directory", str(run.path)]]
    if "student" in config:
        lines.append(["student", config["student"]["backbone"]])
    if config.get("teacher", {}).get("weights"):
        teacher = config["teacher"]
        lines.append(["teacher", f"{teacher['backbone']}, {teacher['weights']}"])
    if "data" in config:
        data = config["data"]
        lines.append(["data", f"{data['name']} ({data['source']}), {data['train_split']}"])
    if run.metrics:
        last = run.metrics[-1]
        epoch = f", epoch {last['epoch']:.2f}" if "epoch" in last else ""
        lines.append(["step", f"{last['step']}{epoch}"])
    if (loss := run.last("loss")) is not None:
        lines.append(["loss", f"{loss:.4f}"])
    return lines


def _classes(run: Run) -> list[list[str]]:
    """The classes that each evaluation tells apart worst and best, with their top-1."""
    lines = []
    for name, result in run.results.items():
        known = [
            (top1, i) for i, top1 in enumerate(result.get("class_top1", ())) if top1 is not None
        ]
        if len(known) >= 2 * _SHOWN_CLASSES:
            known.sort()
            ends = known[:_SHOWN_CLASSES], known[: -_SHOWN_CLASSES - 1 : -1]
            lines.append([name, *(", ".join(f"{i} ({t:.1f} %)" for t, i in end) for end in ends)])
    return lines


def _cost(run: Run) -> list[list[Any]]:
    return [
        [
            row["backbone"],
            row["parameters"] / 2**20,
            row["multiply_adds"] / 1e6,
            row["median_ms"],
        ]
        for result in run.results.values()
        for row in result.get("rows", ())
        if "multiply_adds" in row
    ]


def _sheet(run: Run, views: bytes | None) -> str:
    if views is None:
        return ""
    count = run.config.get("views", 0) + run.config.get("local", {}).get("count", 0)
    return page.picture(
        views,
        f"A column an image: at the top the image itself, then its {count} views after crops and "
        "photometric operations, the normalisation undone.",
    )


def _time(run: Run, drawn: Mapping[str, bytes]) -> list[str]:
    if "times" not in drawn:
        return []
    total = sum(run.seconds.values())
    lines = [
        [part, _PARTS.get(part, ""), f"{spent:.1f}", f"{100 * spent / total:.1f} %"]
        for part, spent in run.seconds.items()
    ]
    return [page.picture(drawn["times"]), page.table(("", "", "seconds", "share"), lines)]


def _put(file: epath.Path, content: bytes) -> None:
    with whole(file) as unfinished:
        unfinished.write_bytes(content)
