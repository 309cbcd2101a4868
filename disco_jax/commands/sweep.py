"""Train and evaluate all cells of a sweep, and write them to one table."""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags as absl_flags
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors, flags, methods, models, programs
from disco_jax.data.contract import Source
from disco_jax.files import read_or_set_aside, whole
from disco_jax.report import figures, page, runs
from disco_jax.run import hosts, lease
from disco_jax.sweeps import cells as expanding
from disco_jax.sweeps import claims, table
from disco_jax.sweeps.cells import Cell
from disco_jax.train import experiment, stored_settings, teacher
from disco_jax.train.experiment import Experiment
from disco_jax.train.joint import Diverged
from disco_jax.workflows import joint_runs, pretrain, scoring
from disco_jax.workflows.scoring import Score

COST = "cost"  # the evaluation without an accuracy
CELLS, TEACHERS, STATUS = "cells", "teachers", "status"


def main(argv: Sequence[str]) -> None:
    """Runs `disco-jax sweep --config sweeps/NAME --workdir DIR [--dry-run] [--worker I ...]`."""
    values = flags.parse("sweep", argv, help_line=__doc__, extra=_define, like="sweeps/seed")
    if values is None:
        return
    flags.prepare_jax(flags.distributed_options(values), "" if values.dry_run else values.workdir)
    names = ("dry_run", "costs", "topology", "worker", "workers", "teachers_only")
    options: dict[str, Any] = {name: values[name].value for name in names}
    run(values.config, values.workdir, **options)


def _define(values: absl_flags.FlagValues) -> None:
    absl_flags.DEFINE_bool(
        "dry_run", False, "only print the cells and their evaluations", flag_values=values
    )
    absl_flags.DEFINE_bool(
        "costs", False, "with --dry-run: count parameters and operations", flag_values=values
    )
    absl_flags.DEFINE_string(
        "topology", "", "with --dry-run: compile each cell for this TPU slice", flag_values=values
    )
    absl_flags.DEFINE_integer("worker", 0, "index of this worker, from 0", flag_values=values)
    absl_flags.DEFINE_integer(
        "workers", 1, "number of workers that share the cells", flag_values=values
    )
    absl_flags.DEFINE_bool(
        "teachers_only", False, "only train the sweep's own teachers", flag_values=values
    )


def run(
    config: ConfigDict,
    folder: str,
    source: Source | None = None,
    *,
    dry_run: bool = False,
    costs: bool = False,
    topology: str = "",
    worker: int = 0,
    workers: int = 1,
    teachers_only: bool = False,
) -> dict[str, Any]:
    """Trains and evaluates the remaining cells; a restart resumes where the sweep stopped.

    Args:
      config: see `configs/sweeps/common.py`.
      folder: receives cells/NAME and teachers/NAME (run directories), status/, and the table.
      source: images for all cells; None opens the data of each cell.
      dry_run: only print the cells and their evaluations; needs neither weights nor data.
      costs: a dry run also counts parameters and operations, which takes seconds a cell.
      topology: name of a TPU slice that a dry run compiles each cell for, e.g. "v5e:2x4".
      worker: index of this worker, which trains groups `worker`, `worker + workers`, ...
      workers: number of workers that share `folder`.
      teachers_only: only train the teachers that the sweep defines.

    Returns:
      {"cells": number of cells, "done": number of evaluated cells, "failed": cell -> reason,
      "seconds"}.

    Raises:
      UserError: a setting is invalid; nothing was trained.
      Preempted: stopped by a signal; a restart resumes.
    """
    started = time.monotonic()
    cells = expanding.expand(config)
    scores = scoring.entries(config.evaluate)
    _check(config, worker, workers, scores)
    if dry_run and not (costs or topology):
        return _list(cells, scores)
    teachers = expanding.teachers(config, cells)
    path = epath.Path(folder)
    claims.judge(config.claims, table.rows(cells, {c.name: 0 for c in cells}, {}, {}), "")
    _set_teachers(cells, teachers, path)
    by_name = {cell.name: cell for cell in cells}
    experiments = _assemble(cells)
    groups = _groups(experiments, config.joint)
    if dry_run:
        return _show(experiments, teachers, groups, topology)
    path.mkdir(parents=True, exist_ok=True)
    programs.settle(path)
    with contextlib.ExitStack() as stack:
        hosts.on_process_zero(
            lambda: stack.enter_context(lease.held(path, f"lock_{worker}_of_{workers}"))
        )
        _write_json(path / "sweep.json", json.loads(config.to_json_best_effort()))
        _train_teachers(teachers, path, scores, source, worker)
        if not teachers_only:
            for names in groups[worker::workers]:
                _train([by_name[name] for name in names], path, source)
                for name in names:
                    _evaluate(path / CELLS / name, scores, source)
                _write_table(config, cells, experiments, path, scores)
        summary = _write_table(config, cells, experiments, path, scores)
    print(f"{summary['done']} of {summary['cells']} cells are done. Table: {path / 'table.html'}")
    return summary | {"seconds": round(time.monotonic() - started, 1)}


def _check(config: ConfigDict, worker: int, workers: int, scores: Sequence[Score]) -> None:
    if not 0 <= worker < workers:
        raise errors.UserError(f"--worker={worker} must be in 0..{workers - 1} (--workers).")
    if config.joint < 1:
        raise errors.UserError(f"config.joint={config.joint} must be 1 or more.")
    names = [score.name for score in scores]
    if config.figure.score.partition(",")[0] not in names:
        raise errors.unknown("config.figure.score", config.figure.score, names)
    axes = {axis: None for axes in (config.axes, *config.further) for axis, _ in axes}
    axes |= dict.fromkeys(table.SIZES)
    if config.figure.x and config.figure.x not in axes:
        raise errors.unknown("config.figure.x", config.figure.x, axes)


def _set_teachers(
    cells: Sequence[Cell], teachers: Mapping[str, ConfigDict], path: epath.Path
) -> None:
    """Sets the teachers of cells to runs of the sweep, which may not exist yet."""
    for cell in cells:
        if cell.teacher in teachers:
            _set_teacher(cell.config, teachers[cell.teacher], str(path / TEACHERS / cell.teacher))


def _set_teacher(config: ConfigDict, run_config: ConfigDict, run: str) -> None:
    """Sets the teacher of a cell to a run of the sweep, which may not exist yet."""
    settings = experiment.parse(run_config)
    mean, std = settings.augment.normalization
    config.teacher.update(
        {**teacher.shape(settings.student), "weights": run, "mean": mean, "std": std}
    )


def _assemble(cells: Sequence[Cell]) -> dict[str, Experiment]:
    """Builds the experiment of every cell; raises UserError for invalid cells."""
    experiments = {}
    for cell in cells:
        try:
            experiments[cell.name] = experiment.assemble(cell.config)
        except errors.UserError as error:
            raise errors.UserError(f"Cell {cell.name}: {error}") from error
    return experiments


def _groups(experiments: Mapping[str, Experiment], most: int) -> list[list[str]]:
    """Returns the names of cells that train in one step."""
    return joint_runs.groups(
        {name: joint_runs.key(cell) for name, cell in experiments.items()}, most
    )


def _show(
    experiments: Mapping[str, Experiment],
    teachers: Mapping[str, ConfigDict],
    groups: Sequence[Sequence[str]],
    topology: str,
) -> dict[str, Any]:
    """Prints the cells of a dry run and their costs."""
    from disco_jax.plan import budget

    for name, config in teachers.items():
        print(f"teacher {name}: {budget.told(experiment.assemble(config), topology)}", flush=True)
    for number, names in enumerate(groups):
        print(f"group {number}: {len(names)} in one step", flush=True)
        for name in names:
            print(f"  {name}: {budget.told(experiments[name], topology)}", flush=True)
        if len(names) > 1:
            together = {name: experiments[name] for name in names}
            print(f"  together: {budget.told_together(together)}", flush=True)
    return {"cells": len(experiments), "done": 0, "failed": {}, "groups": [list(g) for g in groups]}


def _list(cells: Sequence[Cell], scores: Sequence[Score]) -> dict[str, Any]:
    """Prints the cells with their teachers, forward passes and evaluations."""
    for cell in cells:
        settings = experiment.parse(cell.config)
        plan = methods.plan(settings.method)
        passes = ", ".join(f"{name} {len(views)}" for name, views in plan.items())
        spec = cell.config.teacher
        taught = f"; teacher {spec.backbone} ({cell.teacher})" if "teacher" in plan else ""
        references = ", ".join(score.complete(settings) for score in scores)
        print(f"{cell.name}: {cell.config.student.backbone}{taught}; {passes}; {references}")
    return {"cells": len(cells), "done": 0, "failed": {}}


def _train_teachers(
    teachers: Mapping[str, ConfigDict],
    path: epath.Path,
    scores: Sequence[Score],
    source: Source | None,
    worker: int,
) -> None:
    """Trains and evaluates the sweep's own teachers in worker 0; others check that they exist."""
    for name, config in teachers.items():
        run, status = path / TEACHERS / name, path / STATUS / f"teacher_{name}.json"
        if status.exists():
            continue
        if worker:
            raise errors.UserError(
                f"The teacher {name} is not trained yet. Start worker 0 with --teachers-only first."
            )
        print(f"\n== teacher {name}", flush=True)
        summary = pretrain.run(config, str(run), source)
        _evaluate(run, scores, source)
        _write_json(status, {"step": summary["step"]})


def _train(group: Sequence[Cell], path: epath.Path, source: Source | None) -> None:
    """Trains the unfinished cells of a group; drops diverged cells and repeats without them."""
    cells = [cell for cell in group if not (path / STATUS / f"{cell.name}.json").exists()]
    while cells:
        names = [cell.name for cell in cells]
        print(f"\n== {'; '.join(names)}", flush=True)
        workdirs = {name: str(path / CELLS / name) for name in names}
        try:
            if len(cells) == 1:
                summary = pretrain.run(cells[0].config, workdirs[names[0]], source)
            else:
                configs = {cell.name: cell.config for cell in cells}
                summary = joint_runs.run(configs, workdirs, source)
        except Diverged as error:
            diverged = {name: str(error) for name in error.names}
        except errors.NumericError as error:
            diverged = {names[0]: str(error)}
        else:
            for name in names:
                _write_json(path / STATUS / f"{name}.json", {"step": summary["step"]})
            return
        for name, reason in diverged.items():
            print(f"{name}: {reason}", flush=True)
            _write_json(path / STATUS / f"{name}.json", {"failed": reason.splitlines()[0]})
        cells = [cell for cell in cells if cell.name not in diverged]


def _evaluate(run: epath.Path, scores: Sequence[Score], source: Source | None) -> None:
    """Runs the evaluations of which a run has no results yet."""
    failed = (_read(run.parent.parent / STATUS / f"{run.name}.json") or {}).get("failed")
    if failed:
        return
    settings = stored_settings.read(run)
    for score in scores:
        scoring.evaluate(str(run), score.task, score.config(settings), source)


def _write_table(
    config: ConfigDict,
    cells: Sequence[Cell],
    experiments: Mapping[str, Experiment],
    path: epath.Path,
    scores: Sequence[Score],
) -> dict[str, Any]:
    """Writes the table and the judged claims of all finished cells; returns their counts."""
    measured: dict[str, table.Measured] = {}
    failed: dict[str, str] = {}
    costs: dict[str, dict[str, float]] = {}
    finished, finished_runs = 0, []
    for cell in cells:
        status = _read(path / STATUS / f"{cell.name}.json")
        if status is None:
            continue
        if "failed" in status:
            failed[cell.name] = status["failed"]
            continue
        run = runs.read(str(path / CELLS / cell.name))
        results = scoring.results(run.path, stored_settings.read(run.path), scores)
        finished += len(results) == len(scores)
        measured[cell.name] = _measured(run, results, scores)
        if COST in results:
            costs[cell.name] = table.cost(results[COST])
        finished_runs.append(run)
    parameters = {name: _parameters(cell) for name, cell in experiments.items()}
    rows = table.rows(cells, parameters, measured, failed, _teachers(experiments), costs)
    if not jax.process_index():
        names = [score.name for score in scores if score.task != COST]
        findings = [f for name in names for f in claims.judge(config.claims, rows, name)]
        above = claims.section(findings), _curves(path, finished_runs, config.curves)
        table.write(path, config.name, rows, names, config.figure, *above)
        if findings:
            claims.write(path, findings)
    return {"cells": len(cells), "done": finished, "failed": failed}


def _measured(run: runs.Run, results: Mapping[str, Any], scores: Sequence[Score]) -> table.Measured:
    """Returns column of the table -> accuracy of a run, from its evaluations."""
    columns, settings = {}, stored_settings.read(run.path)
    for score in scores:
        if score.name in results:
            file = score.config(settings).name
            for row in runs.results(run, file, results[score.name]):
                columns[row.name.replace(file, score.name, 1)] = row
    return columns


def _curves(path: epath.Path, finished: Sequence[runs.Run], keys: Sequence[str]) -> str:
    """Writes curves.png of the cells' metrics and returns its HTML; "" without `keys`."""
    drawn = [key for key in keys if any(key in run.keys for run in finished)]
    if not drawn:
        return ""
    png = figures.curves(finished, drawn)
    with whole(path / "curves.png") as unfinished:
        unfinished.write_bytes(png)
    return page.section("Curves", page.picture(png))


def _teachers(experiments: Mapping[str, Experiment]) -> dict[str, int]:
    """Returns cell -> parameters of its teacher's backbone, of cells that have a teacher."""
    return {
        name: models.parameters(cell.method.networks["teacher"].encoder)
        for name, cell in experiments.items()
        if "teacher" in cell.needs
    }


def _parameters(cell: Experiment) -> int:
    """Counts the parameters of a cell's student with its head."""
    encoder = models.build_encoder(cell.settings.student)
    variables = jax.eval_shape(lambda: encoder.create(0, cell.settings.augment.size))
    return sum(x.size for x in jax.tree.leaves(variables["params"]))


def _write_json(file: epath.Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically, on process 0 only."""
    if jax.process_index():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")


def _read(file: epath.Path) -> dict[str, Any] | None:
    return read_or_set_aside(file)
