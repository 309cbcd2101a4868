"""Flags of a task: --config with overrides, --workdir; every mistake in them told at once."""

import importlib.util
import os
import pathlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from disco_jax import errors, fields
from disco_jax.nested import flatten

CONFIGS = "disco_jax.configs"
FOLDERS = "", "sweeps", "miniature"  # of recipes: of single runs, then of sweeps
PRETRAINING = "moco_v2"  # a recipe of those that `disco-jax pretrain` takes
_OVERRIDE = "--config.", "-config."
# What absl, ml_collections and Python's parser raise for a word that they do not understand.
_REFUSALS = (
    absl_flags.Error,
    TypeError,
    ValueError,
    KeyError,
    SyntaxError,
    OverflowError,
    RecursionError,
    MemoryError,
)


def parse(
    task: str,
    argv: Sequence[str],
    *,
    help_line: str,
    default_config: str = "",
    config: ConfigDict | None = None,
    extra: Any = None,
    needs_workdir: bool = True,
    like: str = PRETRAINING,
    check: Callable[[ConfigDict, errors.Problems], object] | None = None,
) -> absl_flags.FlagValues | None:
    """The values of a task's flags.

    Args:
      task: its name.
      argv: the words after it.
      help_line: what --help shows.
      default_config: the recipe taken when --config is not given; "" if it must be.
      config: instead of a file: the config that --config.x=y changes.
      extra: called with the FlagValues, to define the task's own flags.
      needs_workdir: whether --workdir must be given.
      like: a recipe that the task takes; others must have all its groups and single fields.
      check: notes what else is wrong with a config. Called only where a mistake was found already,
        so that all are told at once: the task makes the same checks later.

    Returns:
      The values, `config` and `workdir` among them; None when the help was asked for.

    Raises:
      UserError: for anything in `argv` that is not known or does not fit.
    """

    def defined() -> absl_flags.FlagValues:
        values = absl_flags.FlagValues()
        absl_flags.DEFINE_string("workdir", None, "where the run lives", flag_values=values)
        _define_meeting(values)
        if extra is not None:
            extra(values)
        return values

    if {"-h", "--help", "--helpfull", "--helpshort"} & set(argv):
        _help(task, help_line, default_config, defined())
        return None
    argv = _joined(argv)
    if config is None:
        config = load(_take_config(argv, default_config))
    fields.check_complete(config, load(default_config or like), task)
    problems = errors.Problems()
    argv = _known_overrides(config, argv, problems)
    values = _values(task, config, argv, defined, problems)
    if needs_workdir and not values.workdir:
        problems.add(f"--workdir is missing. See disco-jax {task} --help.")
    fields.check(values.config, problems)
    if problems and check is not None and not values.distributed:
        check(values.config, problems)
    problems.raise_any()
    return values


def _values(
    task: str,
    config: ConfigDict,
    argv: Sequence[str],
    defined: Callable[[], absl_flags.FlagValues],
    problems: errors.Problems,
) -> absl_flags.FlagValues:
    """The values of words that stand for themselves; notes those that are not understood."""
    try:
        return _read(config, argv, defined())
    except _REFUSALS:
        understood = []
    for word in argv:
        name, _, given = word.lstrip("-").removeprefix("config.").partition("=")
        overrides = word.startswith(_OVERRIDE)
        try:
            _read(_only(config, name) if overrides else ConfigDict(), [word], defined())
            understood.append(word)
        except _REFUSALS as error:
            if overrides:  # of another type
                allowed = fields.rule_in(config, name, flatten(config)[name])
                problems.add(fields.refusal(name, given, allowed), name)
            else:
                problems.add(f"{_sentence(error)} See disco-jax {task} --help.")
    try:
        return _read(config, understood, defined())
    except _REFUSALS as error:  # of words that contradict one another
        problems.add(f"{_sentence(error)} See disco-jax {task} --help.")
        return _read(config, (), defined())


def _read(
    config: ConfigDict, words: Sequence[str], values: absl_flags.FlagValues
) -> absl_flags.FlagValues:
    """The values of a command line, a changed copy of `config` among them; or one of _REFUSALS."""
    line = ["disco-jax", *words]
    own = config.copy_and_resolve_references()
    config_flags.DEFINE_config_dict("config", own, "the recipe", flag_values=values, sys_argv=line)
    if rest := values(line)[1:]:
        raise ValueError(f"Unexpected: {errors.shown(' '.join(rest))}.")
    return values


def _only(config: ConfigDict, name: str) -> ConfigDict:
    """A config with one field, as ml_collections prints a whole one again and again."""
    value = flatten(config)[name]
    for word in reversed(name.split(".")):
        value = {word: value}
    return ConfigDict(value)


def load(reference: str) -> ConfigDict:
    """The config of a recipe.

    Args:
      reference: FILE or FILE:argument; FILE is a path, or the name of a shipped recipe, e.g.
        "configs/disco.py" or "disco" in any directory.

    Raises:
      UserError: when there is no such recipe, it refuses its argument, or it is mistaken.
    """
    name, _, argument = reference.partition(":")
    path = _locate(name)
    try:
        config = _module(path).get_config(argument or None)
    except errors.UserError:
        raise
    except Exception as error:
        raise errors.UserError(_mistake(path, error)) from error
    if not isinstance(config, ConfigDict):
        raise errors.UserError(
            f"--config={path}: get_config must return a ConfigDict, not {errors.shown(config)}. Is "
            "`return config` missing?"
        )
    return config


def _mistake(path: pathlib.Path, error: Exception) -> str:
    """Where and what went wrong in a recipe."""
    if isinstance(error, SyntaxError):
        place, what = f"{error.filename or path}:{error.lineno}", error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        here = path.absolute()
        lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename) == here]
        place = ":".join(map(str, (path, *lines[-1:])))
        what = (str(error).strip().splitlines() or [""])[0][: errors.NAMES_LENGTH]
    return (
        f"--config={path}: the recipe has a mistake, at {place}: {type(error).__name__}: {what} "
        "(--debug shows the traceback)"
    )


def recipes(folder: str = "") -> dict[str, pathlib.Path]:
    """The shipped recipes: name -> file.

    Args:
      folder: of `FOLDERS`.
    """
    found = importlib.util.find_spec(CONFIGS)
    assert found is not None and found.origin is not None  # a package of this one
    place = pathlib.Path(found.origin).parent / folder
    return {
        str(pathlib.PurePosixPath(folder, path.stem)): path
        for path in sorted(place.glob("*.py"))
        if path.stem not in ("__init__", "common")
    }


def _known_overrides(
    config: ConfigDict, argv: Sequence[str], problems: errors.Problems
) -> list[str]:
    """`argv` without the words --config.x.y=z of which x.y is no field, which are noted."""
    known, kept = flatten(config), []
    for word in argv:
        if not word.startswith(_OVERRIDE):
            kept.append(word)
            continue
        field = word.lstrip("-").split("=", 1)[0].removeprefix("config.")
        if field in known:
            kept.append(word)
            continue
        inside = [name for name in known if name.startswith(f"{field}.")]
        near = errors.nearest(field, known)
        if inside:
            hint = f"It is a group: give one of its fields, e.g. --config.{inside[0]}."
        elif near:
            hint = f"Did you mean {near!r}?"
        else:
            hint = "`disco-jax list --settings` shows them all."
        name = field[: errors.VALUE_LENGTH]
        problems.add(f"--config.{name} is not a field of the config. {hint}", near or field)
    return kept


# Flags of single tasks: name -> help.
FURTHER = {
    "profile": "FIRST:LAST, steps of this start to trace into WORKDIR/profile, e.g. 10:15",
    "allow_change": "fields of the config, separated by commas, that may differ on a resume",
}


def define_further(values: absl_flags.FlagValues, names: Sequence[str]) -> None:
    """Defines flags of `FURTHER`, each a word."""
    for name in names:
        absl_flags.DEFINE_string(name, "", FURTHER[name], flag_values=values)


def meeting(values: absl_flags.FlagValues) -> dict[str, Any] | None:
    """How to meet other processes, as `hosts.meet` takes it; None: there are none."""
    given: dict[str, Any] = {
        name: values[name].value for name in ("coordinator", "processes", "process")
    }
    environment = os.environ.get("DISCO_JAX_COORDINATOR")
    if not (values.distributed or given["coordinator"] or environment):
        if given["processes"] or given["process"] >= 0:
            raise errors.UserError("--processes and --process need --coordinator=HOST:PORT too.")
        return None
    return {**given, "timeout_s": values.peer_timeout_s}


def meeting_of(argv: Sequence[str]) -> dict[str, Any] | None:
    """`meeting` of a command line, before its other flags can be read."""
    values = absl_flags.FlagValues()
    _define_meeting(values)
    try:
        values(["disco-jax", *_joined(argv)], known_only=True)
    except absl_flags.Error as error:
        raise errors.UserError(_sentence(error)) from error
    return meeting(values)


def prepare_jax(others: Mapping[str, Any] | None = None, workdir: str = "") -> None:
    """Joins the other processes if there are any, and keeps compiled programs between runs.

    Args:
      others: see `meeting`.
      workdir: where programs are kept, see `programs`; "": in the user's cache.

    Raises:
      UserError: the others are not found.
    """
    from disco_jax import programs
    from disco_jax.plan import topology

    if others is not None:
        from disco_jax.train import hosts

        hosts.meet(**others)
    topology.quiet()
    programs.begin(workdir)


def _define_meeting(values: absl_flags.FlagValues) -> None:
    """The flags of runs of several processes."""
    absl_flags.DEFINE_bool(
        "distributed", False, "several processes: meet the others first", flag_values=values
    )
    absl_flags.DEFINE_string(
        "coordinator", "", "HOST:PORT of process 0, where no cluster tells", flag_values=values
    )
    absl_flags.DEFINE_integer("processes", 0, "how many there are", flag_values=values)
    absl_flags.DEFINE_integer("process", -1, "which this is, from 0", flag_values=values)
    absl_flags.DEFINE_integer(
        "peer_timeout_s",
        100,
        "a process silent for so long ends the run on all",
        lower_bound=1,
        flag_values=values,
    )


def _joined(argv: Sequence[str]) -> list[str]:
    """`--flag value` as `--flag=value`, so that every word stands for itself."""
    joined, words = [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name.startswith("--") and not name.startswith("--config."):
            word = "--" + name[2:].replace("-", "_") + equals + value
        takes_value = word.startswith("-") and "=" not in word
        if takes_value and words and not words[0].startswith("--"):
            word = f"{word}={words.pop(0)}"
        joined.append(word)
    return joined


def _take_config(argv: list[str], default: str) -> str:
    """Removes --config=... from `argv` and returns its value."""
    given = [word for word in argv if word.lstrip("-").startswith("config=")]
    for word in given:
        argv.remove(word)
    if given:
        return given[-1].partition("=")[2]
    if not default:
        raise errors.UserError(
            "--config is missing: give a recipe, e.g. --config=configs/disco.py. `disco-jax list` "
            f"shows all {len(recipes())}."
        )
    return default


def _locate(name: str) -> pathlib.Path:
    """The file of a recipe: a path, or a shipped one by its name."""
    path = pathlib.Path(name)
    if path.is_file():
        return path
    shipped = {name: file for folder in FOLDERS for name, file in recipes(folder).items()}
    parts = path.with_suffix("").parts
    short = "/".join(parts[1:] if parts[:1] == ("configs",) else parts)
    if short in shipped:
        return shipped[short]
    raise errors.unknown("--config", short, shipped)


def _module(path: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise errors.UserError(
            f"--config={path}: a recipe is a Python file, whose name ends in .py."
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise errors.UserError(f"--config={path} has no get_config function.")
    return module


def _help(task: str, line: str, default_config: str, values: absl_flags.FlagValues) -> None:
    print(f"disco-jax {task}: {line}\n\nFlags:")
    print(f"  --config: the recipe (default: {default_config or 'none, it must be given'})")
    print("  --config.FIELD: a field of it, e.g. --config.seed=1")
    for name in values:
        print(f"  --{name}: {values[name].help} (default: {values[name].value})")
    print(f"\nRecipes: {', '.join(recipes())}")


def _sentence(error: Exception) -> str:
    text = str(error).strip().strip("'\"").splitlines()[0][: errors.NAMES_LENGTH]
    return text if text.endswith(".") else text + "."
