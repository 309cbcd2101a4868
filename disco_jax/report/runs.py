"""Reader of run directories for reports; it neither computes nor changes anything."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from disco_jax import files
from disco_jax.errors import UserError
from disco_jax.report import paper
from disco_jax.run import checkpoint, goodput, metrics, workdir

_LOG = logging.getLogger(__name__)

_NOT_RESULTS = (
    workdir.CONFIG,
    workdir.ENVIRONMENT,
    workdir.DATA,
    goodput.FILE,
    checkpoint.SAVED,
    files.LEASE,
)
FIGURES = "figures"
CACHED = "cached features"  # label of classifiers whose features were extracted only once


@dataclasses.dataclass(frozen=True)
class Run:
    """Content of a run directory.

    Attributes:
      path: the directory.
      config: nested dicts, from config.json.
      starts: records of all starts, from environment.json.
      metrics: lines of metrics.jsonl.
      seconds: part -> seconds, from goodput.json; {} if there is none.
      results: file name -> result of an evaluation.
      pictures: name -> PNG of an evaluation.
      trainings: name of a result -> metrics of its training.
    """

    path: epath.Path
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    metrics: list[dict[str, float]]
    seconds: dict[str, float]
    results: dict[str, dict[str, Any]]
    pictures: dict[str, epath.Path]
    trainings: dict[str, list[dict[str, float]]]

    @property
    def name(self) -> str:
        """Name of the directory."""
        return self.path.name

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Returns (steps, values) of a metric."""
        points = [(line["step"], line[key]) for line in self.metrics if key in line]
        return [step for step, _ in points], [value for _, value in points]

    def last(self, key: str) -> float | None:
        """Returns the newest value of a metric, None if there is none."""
        values = self.series(key)[1]
        return values[-1] if values else None

    @property
    def keys(self) -> list[str]:
        """Names of all metrics."""
        return list(dict.fromkeys(key for line in self.metrics for key in line if key != "step"))


def read(path: str) -> Run:
    """Reads the run in a directory.

    Raises:
      UserError: if there is no run.
    """
    config = workdir.read_config(path).to_dict()
    folder = epath.Path(path)
    goodput_record = _json(folder / goodput.FILE) or {}
    results = {
        file.stem: content
        for file in sorted(folder.glob("*.json"))
        if file.name not in _NOT_RESULTS and isinstance(content := _json(file), dict)
    }
    return Run(
        path=folder,
        config=config,
        starts=_json(folder / workdir.ENVIRONMENT) or [],
        metrics=_metrics(folder),
        seconds=goodput_record.get("seconds", {}),
        results=results,
        pictures={file.stem: file for file in sorted(folder.glob("*.png"))},
        trainings={name: content for name in results if (content := _metrics(folder / name))},
    )


def _metrics(folder: epath.Path) -> list[dict[str, Any]]:
    """Returns the lines of a training's metrics; skips damaged and incomplete ones."""
    return metrics.read(folder / metrics.FILE)[0]


def _json(file: epath.Path) -> Any:
    """Returns the content of a file; None if it is missing, or damaged (with a warning)."""
    if not file.exists():
        return None
    try:
        return files.read_json(file, object)
    except UserError as error:
        _LOG.warning("%s The report omits it.", error)
        return None


@dataclasses.dataclass(frozen=True)
class Row:
    """Row of the results table; accuracies in percent.

    Attributes:
      name: name of the evaluation.
      data: name of the data set.
      top1: measured top-1; None if only the paper has a number.
      top5: measured top-5, or None.
      spread: "(low to high)" at 95 %, or "+- deviation" over seeds, or "".
      step: training step of the checkpoint.
      printed: the paper's result; None if there is none.
      cached: whether features were extracted once, without new crops in every epoch.
    """

    name: str
    data: str = ""
    top1: float | None = None
    top5: float | None = None
    spread: str = ""
    step: int | None = None
    printed: paper.Value | None = None
    cached: bool = False

    @property
    def title(self) -> str:
        """Name of the evaluation, with the label of cached features."""
        return f"{self.name} ({CACHED})" if self.cached else self.name


def rows(run: Run) -> list[Row]:
    """Returns all accuracies of a run with the papers' values, then those that only a paper has."""
    printed = paper.values(run.config)
    measured: list[Row] = []
    for name, result in run.results.items():
        measured += _of_result(name, result, printed)
    kinds = {paper.kind(row.name) for row in measured if row.printed}
    measured += [
        Row(name, paper.DATA, printed=value) for name, value in printed.items() if name not in kinds
    ]
    return measured


def _of_result(
    name: str, result: Mapping[str, Any], printed: Mapping[str, paper.Value]
) -> Sequence[Row]:
    data, step = result.get("data", ""), result.get("step")
    if "shots" in result:
        return [
            Row(
                f"{name}, {count} images a class",
                data,
                shot_result["top1"],
                None,
                f"+- {shot_result['top1_spread']:.2f}",
                step,
            )
            for count, shot_result in result["shots"].items()
        ]
    if not isinstance(result.get("top1"), int | float):
        return []
    low, high = result.get("top1_interval", (None, None))
    return [
        Row(
            name,
            data,
            result["top1"],
            result.get("top5"),
            "" if low is None else f"({low:.2f} to {high:.2f})",
            step,
            printed.get(paper.kind(name)) if data == paper.DATA else None,
            bool(result.get("cached")),
        )
    ]
