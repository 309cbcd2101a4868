"""Flags of a task: --config with overrides, --workdir. Reports all mistakes in one error."""

import importlib.util
import logging
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

_LOG = logging.getLogger(__name__)

CONFIGS = "disco_jax.configs"
FOLDERS = "", "sweeps", "miniature"  # subfolders with recipes: single runs, then sweeps
PRETRAINING = "moco_v2"  # an example of a recipe for `disco-jax pretrain`
_OVERRIDE = "--config.", "-config."
# Exceptions of absl, ml_collections and Python's parser for an invalid argument.
_PARSE_ERRORS = (
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
    choose: Callable[[str, str], str] | None = None,
) -> absl_flags.FlagValues | None:
    """Parses the flags of a task.

    Args:
      task: name of the task.
      argv: the command-line arguments after the task's name.
      help_line: description for --help.
      default_config: the default of --config; "" if the flag is required.
      config: base config for --config.x=y overrides, used instead of a recipe file.
      extra: called with the FlagValues to define the task's own flags.
      needs_workdir: --workdir is required.
      like: a recipe of the task; the config must have all its top-level fields.
      check: records further mistakes in a config. It is called only if a mistake was found
        already, to report all in one error; otherwise the task makes the same checks later.
      choose: completes a recipe's reference by the run in --workdir: (reference, run) -> reference.

    Returns:
      The flag values, including `config` and `workdir`; None if help was printed.

    Raises:
      UserError: `argv` has unknown flags or invalid values.
    """

    def defined() -> absl_flags.FlagValues:
        values = absl_flags.FlagValues()
        absl_flags.DEFINE_string("workdir", None, "where the run lives", flag_values=values)
        _define_distributed(values)
        if extra is not None:
            extra(values)
        return values

    if {"-h", "--help", "--helpfull", "--helpshort"} & set(argv):
        _help(task, help_line, default_config, defined())
        return None
    argv = _joined(argv)
    if config is None:
        reference = _take_config(argv, default_config)
        run = next((w.partition("=")[2] for w in argv if w.startswith("--workdir=")), "")
        config = load(choose(reference, run) if choose and run else reference)
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
    """Parses arguments of the form --flag=value; records the invalid ones in `problems`."""
    try:
        return _read(config, argv, defined())
    except _PARSE_ERRORS:
        valid = []
    for word in argv:
        name, _, value = word.lstrip("-").removeprefix("config.").partition("=")
        overrides = word.startswith(_OVERRIDE)
        try:
            _read(_only(config, name) if overrides else ConfigDict(), [word], defined())
            valid.append(word)
        except _PARSE_ERRORS as error:
            if overrides:  # the value has another type than the field
                allowed = fields.rule_in(config, name, flatten(config)[name])
                problems.add(fields.refusal(name, value, allowed), name)
            else:
                problems.add(f"{_sentence(error)} See disco-jax {task} --help.")
    try:
        return _read(config, valid, defined())
    except _PARSE_ERRORS as error:  # flags that contradict each other
        problems.add(f"{_sentence(error)} See disco-jax {task} --help.")
        return _read(config, (), defined())


def _read(
    config: ConfigDict, words: Sequence[str], values: absl_flags.FlagValues
) -> absl_flags.FlagValues:
    """Parses a command line with overrides of a copy of `config`; raises one of _PARSE_ERRORS."""
    line = ["disco-jax", *words]
    own = config.copy_and_resolve_references()
    config_flags.DEFINE_config_dict("config", own, "the recipe", flag_values=values, sys_argv=line)
    if rest := values(line)[1:]:
        raise ValueError(f"Unexpected: {errors.shown(' '.join(rest))}.")
    return values


def _only(config: ConfigDict, name: str) -> ConfigDict:
    """Returns a config with one field; ml_collections prints the whole config in its errors."""
    value = flatten(config)[name]
    for word in reversed(name.split(".")):
        value = {word: value}
    return ConfigDict(value)


def load(reference: str) -> ConfigDict:
    """Loads the config of a recipe.

    Args:
      reference: FILE or FILE:argument; FILE is a path, or the name of a shipped recipe, e.g.
        "configs/disco.py" or "disco" in any directory.

    Raises:
      UserError: the recipe does not exist, rejects its argument, raises an exception, or sets a
        field that no pretraining config has.
    """
    from disco_jax.run import upgrades

    name, _, argument = reference.partition(":")
    path = _locate(name)
    config = _get_config(path, argument)
    if not isinstance(config, ConfigDict):
        raise errors.UserError(
            f"--config={path}: get_config must return a ConfigDict, not {errors.shown(config)}. Is "
            "`return config` missing?"
        )
    upgrades.rename(config)
    if "objectives" in config and path != _locate(PRETRAINING):
        fields.check_known(config, _get_config(_locate(PRETRAINING), ""), str(path))
    return config


def shipped_name(reference: str) -> str:
    """Returns the name of the shipped recipe that a reference selects, "" for another file."""
    path = _locate(reference.partition(":")[0]).resolve()
    shipped = {file.resolve(): name for name, file in recipes().items()}
    return shipped.get(path, "")


def with_arguments(reference: str, arguments: str) -> str:
    """Returns the reference of a recipe with further arguments ("key=value,..."); the last wins."""
    name, _, first = reference.partition(":")
    combined = ",".join(filter(None, (first, arguments)))
    return f"{name}:{combined}" if combined else name


def _get_config(path: pathlib.Path, argument: str) -> Any:
    """Returns what a recipe's `get_config` does; raises UserError for its exceptions."""
    try:
        return _module(path).get_config(argument or None)
    except errors.UserError:
        raise
    except Exception as error:
        raise errors.UserError(_mistake(path, error)) from error


def _mistake(path: pathlib.Path, error: Exception) -> str:
    """Returns the message for an exception raised by a recipe, with file and line."""
    if isinstance(error, SyntaxError):
        place, reason = f"{error.filename or path}:{error.lineno}", error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        recipe = path.absolute()
        lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename) == recipe]
        place = ":".join(map(str, (path, *lines[-1:])))
        reason = (str(error).strip().splitlines() or [""])[0][: errors.NAMES_LENGTH]
    return (
        f"--config={path}: the recipe has a mistake, at {place}: {type(error).__name__}: {reason} "
        "(--debug shows the traceback)"
    )


def recipes(folder: str = "") -> dict[str, pathlib.Path]:
    """Returns the shipped recipes of a folder as name -> file.

    Args:
      folder: one of `FOLDERS`.
    """
    spec = importlib.util.find_spec(CONFIGS)
    assert spec is not None and spec.origin is not None  # a subpackage of this package
    place = pathlib.Path(spec.origin).parent / folder
    return {
        str(pathlib.PurePosixPath(folder, path.stem)): path
        for path in sorted(place.glob("*.py"))
        if "\ndef get_config(" in path.read_text()  # others are modules that recipes share
    }


def _known_overrides(
    config: ConfigDict, argv: Sequence[str], problems: errors.Problems
) -> list[str]:
    """Returns `argv` with the overrides of known fields, renamed ones under their new names.

    Unknown fields are recorded in `problems`.
    """
    from disco_jax.run import upgrades

    known_fields, valid = flatten(config), []
    for word in argv:
        if not word.startswith(_OVERRIDE):
            valid.append(word)
            continue
        field = word.lstrip("-").split("=", 1)[0].removeprefix("config.")
        if field in known_fields:
            valid.append(word)
            continue
        if current := upgrades.current_name(field, known_fields):
            valid.append(word.replace(field, current, 1))
            continue
        inside = [name for name in known_fields if name.startswith(f"{field}.")]
        near = errors.nearest(field, known_fields)
        if inside:
            hint = f"It is a group: give one of its fields, e.g. --config.{inside[0]}."
        elif near:
            hint = f"Did you mean {near!r}?"
        else:
            hint = "`disco-jax list --settings` shows all fields."
        name = field[: errors.VALUE_LENGTH]
        problems.add(f"--config.{name} is not a field of the config. {hint}", near or field)
    return valid


# Flags of single tasks: name -> help.
FURTHER = {
    "profile": "FIRST:LAST, steps of this start to trace into WORKDIR/profile, e.g. 10:15",
    "allow_change": "comma-separated config fields that may differ when a run is resumed",
}


def define_further(values: absl_flags.FlagValues, names: Sequence[str]) -> None:
    """Defines the string flags of `FURTHER` with the given names."""
    for name in names:
        absl_flags.DEFINE_string(name, "", FURTHER[name], flag_values=values)


def distributed_options(values: absl_flags.FlagValues) -> dict[str, Any] | None:
    """Returns the arguments of `hosts.initialize`; None if there is a single process."""
    settings: dict[str, Any] = {
        name: values[name].value for name in ("coordinator", "processes", "process")
    }
    environment = os.environ.get("DISCO_JAX_COORDINATOR")
    if not (values.distributed or settings["coordinator"] or environment):
        if settings["processes"] or settings["process"] >= 0:
            raise errors.UserError("--processes and --process need --coordinator=HOST:PORT too.")
        return None
    return {**settings, "timeout_s": values.peer_timeout_s}


def parse_distributed(argv: Sequence[str]) -> dict[str, Any] | None:
    """Returns `distributed_options` for a command line, before its other flags can be parsed."""
    values = absl_flags.FlagValues()
    _define_distributed(values)
    try:
        values(["disco-jax", *_joined(argv)], known_only=True)
    except absl_flags.Error as error:
        raise errors.UserError(_sentence(error)) from error
    return distributed_options(values)


def prepare_jax(distributed: Mapping[str, Any] | None = None, workdir: str = "") -> None:
    """Connects to the other processes, if any, and enables the compilation cache.

    Args:
      distributed: see `distributed_options`.
      workdir: directory of the compilation cache, see `programs`; "" for the user's cache.

    Raises:
      UserError: the other processes cannot be reached.
    """
    from disco_jax import programs
    from disco_jax.plan import topology

    if distributed is not None:
        from disco_jax.run import hosts

        hosts.initialize(**distributed)
    topology.quiet()
    programs.begin(workdir)


def _define_distributed(values: absl_flags.FlagValues) -> None:
    """Defines the flags of distributed runs."""
    absl_flags.DEFINE_bool(
        "distributed",
        False,
        "run in several processes, detected from the cluster",
        flag_values=values,
    )
    absl_flags.DEFINE_string(
        "coordinator", "", "HOST:PORT of process 0, if no cluster is detected", flag_values=values
    )
    absl_flags.DEFINE_integer("processes", 0, "number of processes", flag_values=values)
    absl_flags.DEFINE_integer("process", -1, "index of this process, from 0", flag_values=values)
    absl_flags.DEFINE_integer(
        "peer_timeout_s",
        100,
        "seconds without a sign of life of a process after which the run ends on all",
        lower_bound=1,
        flag_values=values,
    )


def _joined(argv: Sequence[str]) -> list[str]:
    """Joins `--flag value` to `--flag=value`, so that each argument can be parsed alone."""
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
    matches = [word for word in argv if word.lstrip("-").startswith("config=")]
    for word in matches:
        argv.remove(word)
    if matches:
        return matches[-1].partition("=")[2]
    if not default:
        raise errors.UserError(
            "--config is missing: give a recipe, e.g. --config=configs/disco.py. `disco-jax list` "
            f"shows all {len(recipes())}."
        )
    return default


def _locate(name: str) -> pathlib.Path:
    """Returns the file of a recipe, which is a path or the name of a shipped recipe."""
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
        raise errors.UserError(f"--config={path} is not a recipe: give a Python file (.py).")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise errors.UserError(f"--config={path} has no get_config function.")
    return module


def _help(task: str, line: str, default_config: str, values: absl_flags.FlagValues) -> None:
    print(f"disco-jax {task}: {line}\n\nFlags:")
    print(f"  --config: the recipe (default: {default_config or 'none, required'})")
    print("  --config.FIELD: a field of it, e.g. --config.seed=1")
    for name in values:
        print(f"  --{name}: {values[name].help} (default: {values[name].value})")
    print(f"\nRecipes: {', '.join(recipes())}")


def _sentence(error: Exception) -> str:
    text = str(error).strip().strip("'\"").splitlines()[0][: errors.NAMES_LENGTH]
    return text if text.endswith(".") else text + "."
