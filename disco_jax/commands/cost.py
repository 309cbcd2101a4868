"""Compare the cost of students with their accuracy: parameters, multiply-adds, latency, top-1."""

import json
import platform
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors, files, models
from disco_jax.evaluate import cost, plots
from disco_jax.models.encoder import Encoder
from disco_jax.train import stored_settings


def run(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Measures the backbones in `config.students` and the students of `config.runs`.

    Writes NAME.json to `workdir` and, if a run has a result, NAME.png. NAME is `config.name`.

    Args:
      config: see `configs/cost.py`.
      workdir: any directory.

    Returns:
      {"rows": [{"backbone", "method", "size", "parameters", "multiply_adds", "median_ms",
      "top1": percent or None}, ...], "machine"}.

    Raises:
      UserError: an unknown network, a directory that is not a run, or nothing to measure.
    """
    networks = _backbones(config) + [_network_of(run, config.result) for run in config.runs]
    if not networks:
        raise errors.UserError(
            'Nothing to measure: give --config.runs="(\'RUN\',)" or --config.students="'
            "('resnet18',)\"."
        )
    measured: dict[Any, dict[str, Any]] = {}
    rows = []
    for row, encoder in networks:
        key = (encoder.backbone, row["size"])
        if key not in measured:
            measured[key] = cost.of(encoder, row["size"], config.repeats)
        rows.append({**row, **measured[key]})
    machine = f"{platform.processor() or platform.machine()}, jax {jax.__version__}, float32"
    result = {"rows": rows, "machine": machine}
    path = epath.Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{config.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    with_result = [row for row in rows if row["top1"] is not None]
    if with_result:
        plots.accuracy_of_size(with_result, path / f"{config.name}.png")
    print(_table(rows))
    return result


def _backbones(config: ConfigDict) -> list[tuple[dict[str, Any], Encoder]]:
    networks = []
    for name in config.students:
        models.find(name, "config.students")
        row = {"backbone": name, "method": "", "size": config.size, "top1": None}
        networks.append((row, models.backbone(name)))
    return networks


def _network_of(run: str, result: str) -> tuple[dict[str, Any], Encoder]:
    settings = stored_settings.read(run)
    file = epath.Path(run) / f"{result}.json"
    top1 = files.read_json(file)["top1"] if file.exists() else None
    row = {
        "backbone": settings.student.backbone,
        "method": settings.name or epath.Path(run).name,
        "size": settings.augment.size,
        "top1": top1,
        "run": str(run),
    }
    return row, models.build_encoder(settings.student)


def _table(rows: list[dict[str, Any]]) -> str:
    """Formats the rows; as in the papers, M is 2^20 for parameters and 10^6 for multiply-adds."""
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
