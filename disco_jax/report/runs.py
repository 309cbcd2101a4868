"""What a run directory holds, read for a report: nothing here computes or changes anything."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from disco_jax import files
from disco_jax.errors import UserError
from disco_jax.evaluate import saved
from disco_jax.report import paper
from disco_jax.train import checkpoint, goodput, workdir

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


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
      path: of it.
      config: nested dicts, as config.json has them.
      starts: what environment.json notes of every start.
      metrics: lines of metrics.jsonl.
      seconds: part -> seconds, of goodput.json; {} without one.
      results: name of the file -> what an evaluation wrote.
      pictures: name -> PNG that an evaluation drew.
      trainings: name of a result -> lines of the metrics of the training that it is of.
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
        """Of the directory."""
        return self.path.name

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a metric."""
        found = [(line["step"], line[key]) for line in self.metrics if key in line]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, key: str) -> float | None:
        """The newest value of a metric."""
        values = self.series(key)[1]
        return values[-1] if values else None

    @property
    def keys(self) -> list[str]:
        """Names of all metrics."""
        return list(dict.fromkeys(key for line in self.metrics for key in line if key != "step"))


def read(path: str) -> Run:
    """The run in a directory.

    Raises:
      UserError: there is none.
    """
    config = workdir.read_config(path).to_dict()
    place = epath.Path(path)
    noted = _json(place / goodput.FILE) or {}
    results = {
        file.stem: found
        for file in sorted(place.glob("*.json"))
        if file.name not in _NOT_RESULTS and isinstance(found := _json(file), dict)
    }
    return Run(
        path=place,
        config=config,
        starts=_json(place / workdir.ENVIRONMENT) or [],
        metrics=saved.metrics(path),
        seconds=noted.get("seconds", {}),
        results=results,
        pictures={file.stem: file for file in sorted(place.glob("*.png"))},
        trainings={name: found for name in results if (found := saved.metrics(str(place / name)))},
    )


def _json(file: epath.Path) -> Any:
    """Returns what a file holds; None where there is none, or it is damaged, with a warning."""
    if not file.exists():
        return None
    try:
        return files.read_json(file, object)
    except UserError as error:
        _LOG.warning("%s It is left out.", error)
        return None


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table of results; accuracies in percent.

    Attributes:
      name: of the evaluation.
      data: set that it is of.
      top1: measured; None where only the paper has a number.
      top5: likewise.
      spread: "(low to high)" at 95 %, or "+- deviation" over seeds, or "".
      step: of the checkpoint.
      printed: what the paper says; None if it does not.
    """

    name: str
    data: str = ""
    top1: float | None = None
    top5: float | None = None
    spread: str = ""
    step: int | None = None
    printed: paper.Value | None = None


def rows(run: Run) -> list[Row]:
    """Every accuracy of a run, the papers' beside; last those that only a paper has."""
    printed = paper.values(run.config)
    found: list[Row] = []
    for name, result in run.results.items():
        found += _of_result(name, result, printed)
    seen = {paper.kind(row.name) for row in found if row.printed}
    found += [
        Row(name, paper.DATA, printed=value) for name, value in printed.items() if name not in seen
    ]
    return found


def _of_result(
    name: str, result: Mapping[str, Any], printed: Mapping[str, paper.Value]
) -> Sequence[Row]:
    data, step = result.get("data", ""), result.get("step")
    if "shots" in result:
        return [
            Row(
                f"{name}, {count} images a class",
                data,
                found["top1"],
                None,
                f"+- {found['top1_spread']:.2f}",
                step,
            )
            for count, found in result["shots"].items()
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
        )
    ]
