"""Run every cell of a sweep, score it, and put all of them in one table."""

import contextlib
import importlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags as absl_flags
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors, flags, methods, models, programs
from disco_jax.data import pipeline
from disco_jax.data.base import Source
from disco_jax.files import read_or_set_aside, whole
from disco_jax.report import runs
from disco_jax.sweeps import cells as expanding
from disco_jax.sweeps import claims, table
from disco_jax.sweeps.cells import Cell
from disco_jax.tasks import joint, pretrain
from disco_jax.train import hosts, lease, teacher, workdir
from disco_jax.train.joint import Diverged

# Recipes that score a run -> the task.
EVALUATIONS = {"linear": "linear", "knn": "knn", "semi": "linear", "finetune": "linear"}
CELLS, TEACHERS, STATUS = "cells", "teachers", "status"


def main(argv: Sequence[str]) -> None:
    """`disco-jax sweep --config sweeps/NAME --workdir DIR [--dry-run] [--worker I --workers N]`."""
    values = flags.parse("sweep", argv, help_line=__doc__, extra=_define, like="sweeps/seed")
    if values is None:
        return
    flags.prepare_jax(flags.distributed_options(values), "" if values.dry_run else values.workdir)
    names = ("dry_run", "topology", "worker", "workers", "teachers_only")
    given: dict[str, Any] = {name: values[name].value for name in names}
    run(values.config, values.workdir, **given)


def _define(values: absl_flags.FlagValues) -> None:
    absl_flags.DEFINE_bool("dry_run", False, "only list the cells and costs", flag_values=values)
    absl_flags.DEFINE_string(
        "topology", "", "with --dry-run: compile each for this TPU slice", flag_values=values
    )
    absl_flags.DEFINE_integer("worker", 0, "which of --workers this is", flag_values=values)
    absl_flags.DEFINE_integer("workers", 1, "that share the cells", flag_values=values)
    absl_flags.DEFINE_bool(
        "teachers_only", False, "train the sweep's own teachers and end", flag_values=values
    )


def run(
    config: ConfigDict,
    folder: str,
    source: Source | None = None,
    *,
    dry_run: bool = False,
    topology: str = "",
    worker: int = 0,
    workers: int = 1,
    teachers_only: bool = False,
) -> dict[str, Any]:
    """Trains and scores what is not done yet; goes on where it was stopped if started again.

    Args:
      config: see `common.sweep`.
      folder: gets cells/NAME and teachers/NAME (a run's directory each), status/, and the table.
      source: images of all cells; None opens what each of them names.
      dry_run: only prints the cells and what they cost.
      topology: of a TPU slice that a dry run compiles each cell for, e.g. "v5e:2x4".
      worker: this one takes groups of cells number `worker`, `worker + workers`, ...
      workers: that share `folder`.
      teachers_only: ends when the teachers that the sweep makes itself are trained.

    Returns:
      {"cells": how many, "done": how many, "failed": cell -> why, "seconds"}.

    Raises:
      UserError: a setting will not do; nothing was trained.
      Preempted: asked to stop; start again to go on.
    """
    started = time.monotonic()
    every = expanding.expand(config)
    evaluations = _evaluations(config)
    _check(config, worker, workers, evaluations)
    own = expanding.teachers(config, every)
    path = epath.Path(folder)
    claims.judge(config.claims, table.rows(every, {c.name: 0 for c in every}, {}, {}), "")
    for cell in every:
        if cell.teacher in own:
            _take_teacher(cell.config, own[cell.teacher], str(path / TEACHERS / cell.teacher))
    by_name = {cell.name: cell for cell in every}
    groups = _groups(by_name, config.joint)
    if dry_run:
        return _show(by_name, own, groups, topology)
    path.mkdir(parents=True, exist_ok=True)
    programs.settle(path)
    with contextlib.ExitStack() as held:
        hosts.first(lambda: held.enter_context(lease.held(path, f"lock_{worker}_of_{workers}")))
        _note(path / "sweep.json", json.loads(config.to_json_best_effort()))
        _make_teachers(own, path, evaluations, source, worker)
        if not teachers_only:
            for names in groups[worker::workers]:
                _train([by_name[name] for name in names], path, source)
                for name in names:
                    _score(path / CELLS / name, evaluations, source)
                _tabulate(config, every, path, evaluations)
        found = _tabulate(config, every, path, evaluations)
    print(f"{found['done']} of {found['cells']} cells are done. Table: {path / 'table.html'}")
    return found | {"seconds": round(time.monotonic() - started, 1)}


def _evaluations(config: ConfigDict) -> dict[str, tuple[str, ConfigDict]]:
    """Name of the results -> (task, its config)."""
    found = {}
    for given in config.evaluate:
        recipe, changes = (given, ()) if isinstance(given, str) else given
        name = recipe.partition(":")[0]
        if name not in EVALUATIONS:
            raise errors.unknown("config.evaluate", name, EVALUATIONS)
        one = expanding.changed(flags.load(recipe), changes, "config.evaluate")
        found[one.name] = (EVALUATIONS[name], one)
    return found


def _check(config: ConfigDict, worker: int, workers: int, evaluations: Mapping[str, Any]) -> None:
    if not 0 <= worker < workers:
        raise errors.UserError(f"--worker={worker} must be in 0..{workers - 1} (--workers).")
    if config.joint < 1:
        raise errors.UserError(f"config.joint={config.joint} must be 1 or more.")
    if config.figure.score not in evaluations:
        raise errors.unknown("config.figure.score", config.figure.score, evaluations)
    axes = {axis: None for axes in (config.axes, *config.further) for axis, _ in axes}
    if config.figure.x and config.figure.x not in axes:
        raise errors.unknown("config.figure.x", config.figure.x, axes)


def _take_teacher(config: ConfigDict, run_config: ConfigDict, run: str) -> None:
    """Describes the teacher of a cell, a run that may not be there yet."""
    config.teacher.update(
        {**teacher.shape(run_config.student), "weights": run},
        mean=tuple(run_config.augment.mean),
        std=tuple(run_config.augment.std),
    )


def _groups(by_name: Mapping[str, Cell], most: int) -> list[list[str]]:
    """Names of cells that train in one step; refuses settings that will not do."""
    keys = {}
    for name, cell in by_name.items():
        try:
            resolved = teacher.resolve(cell.config)
            method = methods.build(resolved, resolved.views, resolved.local.count)
        except errors.UserError as error:
            raise errors.UserError(f"Cell {name}: {error}") from error
        keys[name] = joint.key(resolved, method)
    return joint.groups(keys, most)


def _show(
    by_name: Mapping[str, Cell],
    own: Mapping[str, ConfigDict],
    groups: Sequence[Sequence[str]],
    topology: str,
) -> dict[str, Any]:
    """Prints what would be trained, and what of it takes how much."""
    from disco_jax.plan import budget

    for name, config in own.items():
        print(f"teacher {name}: {budget.told(teacher.resolve(config), topology)}", flush=True)
    for number, names in enumerate(groups):
        print(f"group {number}: {len(names)} in one step", flush=True)
        for name in names:
            resolved = teacher.resolve(by_name[name].config)
            print(f"  {name}: {budget.told(resolved, topology)}", flush=True)
        if len(names) > 1:
            every = {name: teacher.resolve(by_name[name].config) for name in names}
            print(f"  together: {budget.told_together(every)}", flush=True)
    return {"cells": len(by_name), "done": 0, "failed": {}, "groups": [list(g) for g in groups]}


def _make_teachers(
    own: Mapping[str, ConfigDict],
    path: epath.Path,
    evaluations: Mapping[str, Any],
    source: Source | None,
    worker: int,
) -> None:
    """Trains and scores the sweep's own teachers; only worker 0 does."""
    for name, config in own.items():
        run, status = path / TEACHERS / name, path / STATUS / f"teacher_{name}.json"
        if status.exists():
            continue
        if worker:
            raise errors.UserError(
                f"The teacher {name} is not trained yet. Start worker 0 with --teachers-only first."
            )
        print(f"\n== teacher {name}", flush=True)
        made = pretrain.run(config, str(run), source)
        _score(run, evaluations, source)
        _note(status, {"step": made["step"]})


def _train(mine: Sequence[Cell], path: epath.Path, source: Source | None) -> None:
    """Trains the cells of a group that are not done; those that diverge are left out."""
    left = [cell for cell in mine if not (path / STATUS / f"{cell.name}.json").exists()]
    while left:
        names = [cell.name for cell in left]
        print(f"\n== {'; '.join(names)}", flush=True)
        places = {name: str(path / CELLS / name) for name in names}
        try:
            if len(left) == 1:
                made = pretrain.run(left[0].config, places[names[0]], source)
            else:
                configs = {cell.name: cell.config for cell in left}
                made = joint.run(configs, places, source)
        except Diverged as error:
            lost = {name: str(error) for name in error.names}
        except errors.NumericError as error:
            lost = {names[0]: str(error)}
        else:
            for name in names:
                _note(path / STATUS / f"{name}.json", {"step": made["step"]})
            return
        for name, reason in lost.items():
            print(f"{name}: {reason}", flush=True)
            _note(path / STATUS / f"{name}.json", {"failed": reason.splitlines()[0]})
        left = [cell for cell in left if cell.name not in lost]


def _score(run: epath.Path, evaluations: Mapping[str, Any], source: Source | None) -> None:
    """Scores a run by the evaluations that it has no results of."""
    failed = (_read(run.parent.parent / STATUS / f"{run.name}.json") or {}).get("failed")
    if failed:
        return
    data = workdir.read_config(str(run)).data
    for name, (task, config) in evaluations.items():
        if not (run / f"{name}.json").exists():
            opened = source or pipeline.open_source(data)
            importlib.import_module(f"disco_jax.tasks.{task}").run(
                config.copy_and_resolve_references(), str(run), opened
            )


def _tabulate(
    config: ConfigDict, every: Sequence[Cell], path: epath.Path, evaluations: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes the table of what is done."""
    results, failed = {}, {}
    for cell in every:
        status = _read(path / STATUS / f"{cell.name}.json")
        if status is None:
            continue
        if "failed" in status:
            failed[cell.name] = status["failed"]
            continue
        run = runs.read(str(path / CELLS / cell.name))
        results[cell.name] = {n: run.results[n] for n in evaluations if n in run.results}
    rows = table.rows(every, {c.name: _parameters(c) for c in every}, results, failed)
    if not jax.process_index():
        findings = [f for name in evaluations for f in claims.judge(config.claims, rows, name)]
        table.write(
            path, config.name, rows, list(evaluations), config.figure, claims.section(findings)
        )
        if findings:
            claims.write(path, findings)
    done = sum(len(found) == len(evaluations) for found in results.values())
    return {"cells": len(every), "done": done, "failed": failed}


def _parameters(cell: Cell) -> int:
    """Of the student with its head."""
    spec = teacher.resolve(cell.config).student
    encoder = models.build_encoder(spec)
    made = jax.eval_shape(lambda: encoder.create(0, cell.config.augment.size))
    return sum(x.size for x in jax.tree.leaves(made["params"]))


def _note(file: epath.Path, said: Mapping[str, Any]) -> None:
    if jax.process_index():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as unfinished:
        unfinished.write_text(json.dumps(said, indent=2) + "\n")


def _read(file: epath.Path) -> dict[str, Any] | None:
    return read_or_set_aside(file)
