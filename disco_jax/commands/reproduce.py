"""List the papers' tables, or train and score one cell by its paper's settings."""

from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict

from disco_jax import errors, flags
from disco_jax import main as main_of_tasks
from disco_jax.arguments import Parser
from disco_jax.data.contract import Source
from disco_jax.report import catalogue, paper, rows, runs
from disco_jax.report.rows import Row

# Flags that train a cell; without them the command lists.
_TRAINING = ("--workdir", "--dry_run", "--dry-run")
TFDS = "tfds"  # the value of --labelled for TFDS's copy of the lists


def main(argv: Sequence[str]) -> None:
    """Runs `disco-jax reproduce [PREFIX]` or `disco-jax reproduce CELL --workdir DIR ...`."""
    names = [word for word in argv[:1] if not word.startswith("-")]
    if names and any(word.partition("=")[0] in _TRAINING for word in argv):
        _main_of_cell(names[0], argv[1:])
        return
    parser = Parser("reproduce", f"{__doc__} {_HELP}")
    parser.add_argument("prefix", nargs="?", default="", help="a table or cell: disco/table1")
    parser.add_argument("--markdown", action="store_true", help="print docs/reproduce.md instead")
    values = parser.read(argv)
    if values is None:
        return
    if values.markdown:
        print(catalogue.markdown(), end="")
    elif not values.prefix:
        print(catalogue.overview())
    else:
        cells = rows.below(values.prefix)
        print(
            "\n".join(catalogue.settings(cells[0])) if len(cells) == 1 else catalogue.listing(cells)
        )


_HELP = (
    "A cell also takes --workdir=DIR, --teacher=WEIGHTS, --classifier=RUN/NAME, "
    "--labelled=FILE, --dry-run, --topology=SLICE, --smoke, and --config.FIELD=VALUE."
)


def _main_of_cell(name: str, argv: Sequence[str]) -> None:
    row = rows.find(name)
    _check_runs(row)
    smoke = "--smoke" in argv
    values = flags.parse(
        "reproduce",
        argv,
        help_line=__doc__,
        config=row.config(smoke),
        extra=_define,
        needs_workdir=not any(word in argv for word in _TRAINING[1:]),
    )
    if values is None:
        return
    if values.teacher:
        values.config.teacher.weights = values.teacher
    evaluation = evaluation_of(row, values.classifier, values.labelled)
    if values.dry_run:
        show(row, values.config, evaluation, values.topology)
        return
    if smoke and "total_epochs" in evaluation:
        evaluation.total_epochs = 1
    flags.prepare_jax(flags.distributed_options(values), values.workdir)
    run(row, values.config, evaluation, values.workdir)


def _define(values: absl_flags.FlagValues) -> None:
    for name, text in (
        ("teacher", "the teacher's weights, as config.teacher.weights"),
        ("classifier", "RUN/NAME of the teacher's linear probe, for KD"),
        ("labelled", "SimCLR's list of the labelled images, or tfds for imagenet2012_subset"),
        ("topology", "with --dry-run: estimate the hours on this TPU slice, e.g. v5e:2x4"),
    ):
        absl_flags.DEFINE_string(name, "", text, flag_values=values)
    absl_flags.DEFINE_bool("dry_run", False, "print settings and needs only", flag_values=values)
    absl_flags.DEFINE_bool("smoke", False, "two steps on small images", flag_values=values)


def evaluation_of(row: Row, classifier: str = "", labelled: str = "") -> ConfigDict:
    """Returns the config of a cell's evaluation.

    Args:
      row: a cell that runs.
      classifier: RUN/NAME of the teacher's linear probe, for cells that distil its classes.
      labelled: for cells with few labels, a list of the images' file names, or "tfds" for the
        data set imagenet2012_subset.
    """
    assert row.evaluation is not None
    evaluation = row.evaluation.config()
    if classifier:
        evaluation.distill.teacher = classifier
    if labelled:
        subset = f"imagenet2012_subset/{evaluation.labelled.percent:.0f}pct"
        tfds = labelled == TFDS
        evaluation.data.update(name=subset if tfds else "", subset="" if tfds else labelled)
        evaluation.labelled.percent = 0.0
    return evaluation


def run(
    row: Row, config: ConfigDict, evaluation: ConfigDict, workdir: str, source: Source | None = None
) -> dict[str, Any]:
    """Trains the student of a cell and evaluates it; skips what is finished.

    Args:
      row: the cell.
      config: its config, with weights and data.
      evaluation: see `evaluation_of`.
      workdir: the run's directory.
      source: images; None opens `config.data`.

    Returns:
      {"row", "top1": measured top-1 or None, "printed": top-1 of the same experiment or None}.

    Raises:
      UserError: a setting is invalid, or weights or files that the cell needs are not given.
    """
    from disco_jax.workflows import pretrain, scoring

    _check_student(row, config)
    missing = needs(row, config, evaluation)
    if missing:
        raise errors.UserError(f"{row.id} needs more:\n  " + "\n  ".join(missing))
    pretrain.run(config, workdir, source)
    assert row.evaluation is not None
    result = scoring.evaluate(workdir, row.evaluation.task, evaluation, source)
    return _report(row, workdir, evaluation.name, result)


def needs(row: Row, config: ConfigDict, evaluation: ConfigDict) -> list[str]:
    """Returns a sentence for each of the weights and files that a cell still lacks."""
    from disco_jax import methods
    from disco_jax.train import experiment

    missing = []
    if "teacher" in methods.plan(experiment.parse(config).method) and not config.teacher.weights:
        missing.append(_teacher(row))
    reads_bags = any(config.objectives[name].weight for name in ("bags", "pseudo_labels"))
    if reads_bags and not config.bags.file:
        missing.append("--config.bags.file=FILE: see `disco-jax bags --help`.")
    distill = evaluation.get("distill", {})
    if distill.get("weight") and not distill.teacher:
        missing.append(
            "--classifier=RUN/NAME: a linear probe of the teacher, by `disco-jax linear --workdir "
            "TEACHER`."
        )
    labelled = evaluation.get("labelled", {})
    if labelled.get("listed") and labelled.percent:
        missing.append(
            f"--labelled=FILE: SimCLR's list of {labelled.listed} images, "
            f"imagenet_subsets/{labelled.percent:.0f}percent.txt; or --labelled=tfds."
        )
    return missing


def _teacher(row: Row) -> str:
    """Returns the sentence about the weights of a cell's teacher."""
    teacher = row.teacher
    assert teacher is not None
    text = f"--teacher=WEIGHTS: a run or a checkpoint of {teacher.backbone} by {teacher.about}"
    text += f" (published as {teacher.file})" if teacher.file else ""
    return text + (f"; `disco-jax reproduce {teacher.row}` trains it." if teacher.row else ".")


def show(row: Row, config: ConfigDict, evaluation: ConfigDict, topology: str = "") -> None:
    """Prints the settings of a cell and what it needs.

    Args:
      row: the cell.
      config: its config.
      evaluation: see `evaluation_of`.
      topology: a TPU slice for which the step is compiled to estimate the hours, e.g. "v5e:2x4".
    """
    print("\n".join([row.id, *catalogue.settings(row)]))
    missing = needs(row, config, evaluation)
    print("\n".join(f"needs: {text}" for text in missing) or "needs: nothing more")
    print(f"config: {config.to_json_best_effort(indent=2, sort_keys=True)}")
    if topology:
        import jax

        jax.config.update("jax_platforms", "cpu")  # the compiler for TPUs runs on the CPU
        config = config.copy_and_resolve_references()
        config.teacher.weights = config.teacher.weights or "random"
        main_of_tasks.module("plan").run(config, topology)


def _check_runs(row: Row) -> None:
    """Raises UserError for a cell that this package cannot run, or that is a figure."""
    if row.missing:
        raise errors.UserError(f"{row.id} cannot run yet. Missing: {row.missing}.")
    if row.command:
        raise errors.UserError(f"{row.id} is drawn from other cells ({row.note}): {row.command}")


def _check_student(row: Row, config: ConfigDict) -> None:
    """Raises UserError for another student, whose evaluation would have other settings."""
    student, backbone = row.arguments["student"], config.student.backbone
    if backbone != student:
        raise errors.UserError(
            f"config.student.backbone={backbone!r}, but {row.id} is of {student}: leave it, give "
            f"the cell of {backbone}, or use `disco-jax pretrain`."
        )


def _report(row: Row, workdir: str, name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Prints the measured and the printed value of a cell and returns them."""
    run = runs.read(workdir)
    measured = runs.results(run, name, result)
    top1 = measured[0].top1 if measured else None
    value = paper.against(row, run.config, result, run.data)
    print(
        f"{row.id}: top-1 {'-' if top1 is None else f'{top1:.2f}'}, "
        f"printed {catalogue.printed(row)}",
        flush=True,
    )
    if value.differences:
        print(f"Not the paper's experiment: {'; '.join(value.differences)}.", flush=True)
    elif value.assumed:
        print(f"Assumed: {'; '.join(value.assumed)}.", flush=True)
    return {"row": row.id, "top1": top1, "printed": None if value.differences else value.top1}
