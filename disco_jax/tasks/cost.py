"""What students cost beside what they reach: parameters, multiply-adds, latency, accuracy."""

import json
import platform
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors, files, models
from disco_jax.evaluate import cost, plots
from disco_jax.models.encoder import Encoder
from disco_jax.train import workdir as directory


def run(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Measures networks by name, and those of runs with their results.

    Writes NAME.json and, where a run has a result, NAME.png to `workdir`, NAME being `config.name`.

    Args:
      config: see `configs/cost.py`.
      workdir: a directory, of a run or not.

    Returns:
      {"rows": [{"backbone", "method", "size", "parameters", "multiply_adds", "median_ms",
      "top1": percent or None}, ...], "machine"}.

    Raises:
      UserError: an unknown network, a run that is none, or nothing to measure.
    """
    todo = _named(config) + [_of_run(run, config.result) for run in config.runs]
    if not todo:
        raise errors.UserError(
            'Nothing to measure: give --config.runs="(\'RUN\',)" or --config.students="'
            "('resnet18',)\"."
        )
    measured: dict[Any, dict[str, Any]] = {}
    rows = []
    for row, encoder in todo:
        key = (encoder.backbone, row["size"])
        if key not in measured:
            measured[key] = cost.of(encoder, row["size"], config.repeats)
        rows.append({**row, **measured[key]})
    machine = f"{platform.processor() or platform.machine()}, jax {jax.__version__}, float32"
    result = {"rows": rows, "machine": machine}
    path = epath.Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{config.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    known = [row for row in rows if row["top1"] is not None]
    if known:
        plots.accuracy_of_size(known, path / f"{config.name}.png")
    print(_table(rows))
    return result


def _named(config: ConfigDict) -> list[tuple[dict[str, Any], Encoder]]:
    made = []
    for name in config.students:
        if name not in models.BACKBONES:
            raise errors.unknown("config.students", name, models.BACKBONES)
        row = {"backbone": name, "method": "", "size": config.size, "top1": None}
        made.append((row, models.backbone(name)))
    return made


def _of_run(run: str, result: str) -> tuple[dict[str, Any], Encoder]:
    config = directory.read_config(run)
    file = epath.Path(run) / f"{result}.json"
    top1 = files.read_json(file)["top1"] if file.exists() else None
    row = {
        "backbone": config.student.backbone,
        "method": config.name or epath.Path(run).name,
        "size": config.augment.size,
        "top1": top1,
        "run": str(run),
    }
    return row, models.build_encoder(config.student)


def _table(rows: list[dict[str, Any]]) -> str:
    """For people: millions as the papers count them, 2^20 parameters and 10^6 multiply-adds."""
    lines = [f"{'network':24} {'method':14} {'px':>4} {'M param':>8} {'M mult-add':>11} "
             f"{'CPU ms':>8} {'top-1':>6}"]  # fmt: skip
    for row in rows:
        top1 = "" if row["top1"] is None else f"{row['top1']:.1f}"
        lines.append(
            f"{row['backbone']:24} {row['method']:14} {row['size']:>4} "
            f"{row['parameters'] / 2**20:>8.2f} {row['multiply_adds'] / 1e6:>11.1f} "
            f"{row['median_ms']:>8.1f} {top1:>6}"
        )
    return "\n".join(lines)
