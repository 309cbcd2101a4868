"""Report of a run and comparison of several runs: reads, draws and writes."""

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
from disco_jax.run import events

_LOG = logging.getLogger(__name__)

_SHOWN_CLASSES = 5  # best and worst classes, each
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
    "init": "everything before the first step except compiling",
    "compile": "compiling",
    "data": "waiting for images",
    "step": "steps",
    "eval": "evaluations while training",
    "save": "waiting for checkpoints",
    "lost": "steps repeated after an interruption",
}


def refresh(enabled: bool, workdir: str) -> None:
    """Writes the report of a run at the end of a task; logs a failure instead of raising it.

    Args:
      enabled: whether to write it, from the config.
      workdir: directory of the run.
    """
    if enabled and not jax.process_index():
        with optional("report"):
            print(f"Report: {write(workdir)}", flush=True)


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """Logs exceptions raised inside as warnings, so that a failed plot cannot end a run."""
    try:
        yield
    except Exception as error:
        _LOG.warning("No %s was written: %s: %s", what, type(error).__name__, error)


def write(workdir: str) -> epath.Path:
    """Writes report.html and figures/*.png of the run in `workdir`.

    Returns:
      The path of the page.

    Raises:
      UserError: if `workdir` is not a run directory.
    """
    run = runs.read(workdir)
    drawings = _draw_figures(run)
    folder = run.path / runs.FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in drawings.items():
        _write_bytes(folder / f"{name}.png", png)
    sheet = folder / f"{SHEET}.png"
    views = sheet.read_bytes() if sheet.exists() else None
    with whole(run.path / FILE) as file:
        file.write_text(_page(run, drawings, views))
    if run.config.get("log", {}).get("tensorboard") and "://" not in str(run.path):
        _tensorboard(run, drawings)
    return run.path / FILE


def _tensorboard(run: Run, drawings: Mapping[str, bytes]) -> None:
    """Writes results, trainings and figures of evaluations for TensorBoard, replacing earlier ones.

    Metrics of the run itself and its contact sheet are logged during training.
    """
    last = int(run.metrics[-1]["step"]) if run.metrics else 0
    with (
        whole(run.path / f"{events.PREFIX}report") as file,
        contextlib.closing(events.Events(file)) as board,
    ):
        for row in runs.rows(run):
            values = {"top1": row.top1, "top5": row.top5}
            present = {f"{row.name}/{key}": x for key, x in values.items() if x is not None}
            board.scalars(last if row.step is None else row.step, present)
        for name, lines in run.trainings.items():
            for line in lines:
                scalars = {f"{name}/{key}": x for key, x in line.items() if key != "step"}
                board.scalars(int(line["step"]), scalars)
        for name, png in drawings.items():
            board.image(last, f"report/{name}", png)
        for name, picture in run.pictures.items():
            board.image(last, f"report/{name}", picture.read_bytes())


def keep_sheet(workdir: str, image: np.ndarray) -> None:
    """Stores a contact sheet, u8[H, W, 3], for later reports."""
    folder = epath.Path(workdir) / runs.FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG")
    _write_bytes(folder / f"{SHEET}.png", stream.getvalue())


def compare(paths: Sequence[str], output: str) -> dict[str, Any]:
    """Writes one page that compares several runs.

    Args:
      paths: run directories, two or more.
      output: an .html file.

    Returns:
      {"runs": names, "differences": field -> value of each run, "results": rows of cells, the run's
      name followed by `page.RESULTS`}.

    Raises:
      UserError: if there are fewer than two paths, or one is not a run directory.
    """
    if len(paths) < 2:
        raise errors.UserError("Give two run directories or more to compare.")
    compared = [runs.read(path) for path in paths]
    names = _names(compared)
    fields = differing([run.config for run in compared])
    lines = [
        line
        for run, name in zip(compared, names, strict=True)
        for line in page.results(runs.rows(run) or [runs.Row("none yet")], name)
    ]
    all_keys = list(dict.fromkeys(key for run in compared for key in run.keys))
    shared = [key for key in all_keys if all(key in run.keys for run in compared)]
    drawings = {
        title: figures.curves(compared, group_keys)
        for title, keys in (("losses", all_keys), ("knn", all_keys), ("health", shared))
        if (group_keys := figures.keys_in_group(keys, title))
    }
    target = epath.Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole(target) as file:
        file.write_text(
            page.page(
                f"{len(compared)} runs compared",
                page.section("Results", page.table(("run", *page.RESULTS), lines)),
                page.section("At the end", page.table(*_last_values(compared, names, all_keys))),
                page.section(
                    "Settings that differ",
                    page.table(
                        ("field", *names),
                        [[f"config.{key}", *map(json.dumps, row)] for key, row in fields.items()],
                    )
                    or page.note("None."),
                ),
                *(page.section(_TITLES[key], page.picture(png)) for key, png in drawings.items()),
            )
        )
    return {"runs": names, "differences": fields, "results": lines}


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns field -> its value in every config, for the fields that differ."""
    flat = [flatten(config) for config in configs]
    keys = sorted(set().union(*flat))
    rows = {key: [config.get(key, "(absent)") for config in flat] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def _names(compared: Sequence[Run]) -> list[str]:
    """Returns the names of the directories, or their paths if the names are not unique."""
    names = [run.name for run in compared]
    return names if len(set(names)) == len(names) else [str(run.path) for run in compared]


def _last_values(compared: Sequence[Run], names: Sequence[str], keys: Sequence[str]) -> Any:
    """Returns head and rows of a table with the newest values of metrics."""
    shown = [key for key in keys if figures.group(key) in ("losses", "knn", "speed")]
    steps = ["step", *(run.metrics[-1]["step"] if run.metrics else None for run in compared)]
    return ("", *names), [steps, *([key, *(run.last(key) for run in compared)] for key in shown)]


def _draw_figures(run: Run) -> dict[str, bytes]:
    """Draws the figures of a run; returns name -> PNG."""
    drawings = {}
    for name in _TITLES:
        if keys := figures.keys_in_group(run.keys, name):
            drawings[name] = figures.curves([run], keys)
    if sum(run.seconds.values()) > 0:
        drawings["times"] = figures.times(run.seconds)
    for name, lines in run.trainings.items():
        training = dataclasses.replace(run, metrics=lines)
        groups = (
            figures.keys_in_group(training.keys, group) for group in ("losses", "knn", "rates")
        )
        if keys := [key for group in groups for key in group]:
            drawings[f"training_{name}"] = figures.curves([training], keys)
    for name in run.results:
        stored = run.path / f"{name}.npz"
        if not stored.exists():
            continue
        with stored.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            table = arrays["confusion"] if "confusion" in arrays.files else None
        if table is not None and (png := figures.confusion(table)):
            drawings[f"confusion_{name}"] = png
    return drawings


def _page(run: Run, drawings: Mapping[str, bytes], views: bytes | None) -> str:
    pictures = {name: page.picture(drawings[name]) for name in _TITLES if name in drawings}
    evaluation_pictures = [
        page.picture(png, f"{name.removeprefix(prefix)}: {what}")
        for prefix, what in (("training_", "its training"), ("confusion_", "where each class went"))
        for name, png in drawings.items()
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
            *evaluation_pictures,
        ),
        page.section("Where the time went", *_time(run, drawings), pictures.get("speed", "")),
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
    """Returns the worst and the best classes of each evaluation, with their top-1."""
    lines = []
    for name, result in run.results.items():
        ranked = [
            (top1, i) for i, top1 in enumerate(result.get("class_top1", ())) if top1 is not None
        ]
        if len(ranked) >= 2 * _SHOWN_CLASSES:
            ranked.sort()
            ends = ranked[:_SHOWN_CLASSES], ranked[: -_SHOWN_CLASSES - 1 : -1]
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
        f"One column per image: the image itself at the top, then its {count} views after crops "
        "and photometric operations, without the normalisation.",
    )


def _time(run: Run, drawings: Mapping[str, bytes]) -> list[str]:
    if "times" not in drawings:
        return []
    total = sum(run.seconds.values())
    lines = [
        [part, _PARTS.get(part, ""), f"{part_seconds:.1f}", f"{100 * part_seconds / total:.1f} %"]
        for part, part_seconds in run.seconds.items()
    ]
    return [page.picture(drawings["times"]), page.table(("", "", "seconds", "share"), lines)]


def _write_bytes(file: epath.Path, content: bytes) -> None:
    with whole(file) as unfinished:
        unfinished.write_bytes(content)
