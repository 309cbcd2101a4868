"""Entry point of the command line, `disco-jax TASK [flags]`: parses flags and calls one task.

A task is a module in `commands/` with a `run` function and an entry in `TASKS`.
"""

import contextlib
import importlib
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from absl import logging as absl_logging

from disco_jax import errors, streams
from disco_jax.version import __version__


class Task(NamedTuple):
    """Description of a task, available without importing its module.

    Attributes:
      help: one line for `disco-jax --help`.
      config: the default of --config; "" if the flag is required; None if the task parses its
        flags itself.
      module: name of the module in `commands/`; "" for the task's name.
      flags: names of `flags.FURTHER`, passed to the task's `run` as keyword arguments.
      check: name of a module in `commands/` whose `check` records mistakes in the config.
      choose: whether the run completes --config, see `evaluate.protocols.choose`.
    """

    help: str
    config: str | None
    module: str = ""
    flags: tuple[str, ...] = ()
    check: str = ""
    choose: bool = False


# Declared here so that --help and flag errors do not import any task.
TASKS = {
    "pretrain": Task(
        "pretrain or distil a student with any method, from one config",
        "",
        flags=("profile", "allow_change"),
        check="pretrain",
    ),
    "distill": Task("distil a student from your images and a teacher, with good defaults", None),
    "sweep": Task("train and score many runs from one config, and write their table", None),
    "cache": Task("save a teacher's outputs for later students", None),
    "plan": Task("estimate memory, speed and hours of a config on a TPU slice", None),
    "knn": Task("classify held-out images by a run's nearest neighbours", "configs/knn.py"),
    "linear": Task(
        "train and test a linear classifier on frozen features",
        "configs/linear.py",
        choose=True,
    ),
    "bags": Task("find similar images with a teacher: neighbours, clusters", "configs/bags.py"),
    "semi": Task(
        "classify with 1 % or 10 % of the labels", "configs/semi.py", "linear", choose=True
    ),
    "transfer": Task(
        "train a linear classifier on another data set", "configs/transfer.py", "linear"
    ),
    "finetune": Task("train all layers with labels", "configs/finetune.py", "linear", choose=True),
    "fewshot": Task("ridge regression on a few images of every class", "configs/fewshot.py"),
    "plane": Task("trace a fine-tuning in the information plane", "configs/plane.py"),
    "tsne": Task("plot ten classes in the feature spaces of runs", "configs/tsne.py"),
    "cost": Task("compare parameters, operations, latency and accuracy", "configs/cost.py"),
    "report": Task("write one page about a run: curves, results, views, settings, time", None),
    "compare": Task("compare several runs in one table and page", None),
    "data": Task("check a data set: counts, classes, sizes, unreadable images, speed", None),
    "import": Task("import a PyTorch checkpoint into a run directory", None, "importing"),
    "export": Task("export a network to PyTorch, Detectron2, ONNX, TFLite or StableHLO", None),
    "embed": Task("write the features of a folder of images, with their file names", None),
    "demo": Task("run the quick start: teacher, baseline and DisCo", "configs/demo.py"),
    "list": Task("list the recipes, networks, objectives and data sets", None),
}

USAGE = """usage: disco-jax TASK [flags]

{tasks}

Flags of most tasks:
  --config FILE[:key=value,...]   a recipe, e.g. configs/disco.py:student=resnet18
  --config.FIELD=VALUE            change any field of it
  --workdir DIR                   the run's directory
  --distributed                   run in several processes. They are detected on TPU pods and under
                                  SLURM and Open MPI; elsewhere pass to each process
                                  --coordinator HOST:PORT --processes N --process I
  --debug                         show tracebacks and the warnings of libraries

`disco-jax TASK --help` shows all flags of a task, `disco-jax --version` the version.
Exit codes: 0 success, 1 crash, 2 invalid setting or input, 3 loss or parameter not finite,
75 stopped by SIGTERM or SIGHUP, 130 stopped by Ctrl-C, 134 another process of the run was lost.
A training saves its last step before it stops (a second Ctrl-C stops it at once). A closed output
(`| head`, a closed terminal) changes none of them: the command continues and discards its output.
"""


def console() -> None:
    """Runs the console script `disco-jax`."""
    streams.protect()
    _set_up_logging(debug="--debug" in sys.argv)
    code = main(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:  # a full disk; Python would print a traceback
        print(f"disco-jax: standard output: {error.strerror}", file=sys.stderr)
        code = code or 1
        sys.stdout = sys.__stdout__
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Runs one task and returns the exit code.

    Args:
      argv: the command-line arguments after `disco-jax`.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, TASKS))
        print(
            USAGE.format(
                tasks="\n".join(f"  {name:{width}}  {task.help}" for name, task in TASKS.items())
            )
        )
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"disco-jax {__version__}")
        return 0
    debug = "--debug" in argv
    try:
        with _signals():
            _start(argv[0], [word for word in argv[1:] if word != "--debug"])
    except (KeyboardInterrupt, errors.Terminated) as error:
        return _report_stop(argv[0], error)
    except Exception as error:
        code, message = _code_and_message(error)
        if debug or not message:
            traceback.print_exc()
        else:
            print(f"disco-jax {argv[0]}: {message}", file=sys.stderr)
        if hosts := sys.modules.get("disco_jax.run.hosts"):
            hosts.exit_all(code)
        return code
    return 0


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Raises `Terminated` on SIGTERM and SIGHUP inside the context.

    Python delivers signals to the main thread only. Ignored signals, e.g. SIGHUP under `nohup`,
    stay ignored.
    """

    def end(*_: Any) -> None:
        raise errors.Terminated

    numbers = []
    if threading.current_thread() is threading.main_thread():
        # In distributed runs JAX handles SIGTERM, so that all processes stop at the same step.
        numbers = [signal.SIGHUP] if _is_distributed() else [signal.SIGTERM, signal.SIGHUP]
    handlers = {number: signal.getsignal(number) for number in numbers}
    replaced = {number: old for number, old in handlers.items() if old != signal.SIG_IGN}
    for number in replaced:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, old in replaced.items():
            signal.signal(number, old)


def _is_distributed() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _report_stop(task: str, error: BaseException) -> int:
    """Prints a message for a signal while there was nothing to save; returns the exit code."""
    kind = errors.Interrupted if isinstance(error, KeyboardInterrupt) else errors.Preempted
    print(
        f"disco-jax {task}: Asked to stop. Files saved before are complete; start the command "
        "again to continue.",
        file=sys.stderr,
    )
    if hosts := sys.modules.get("disco_jax.run.hosts"):
        hosts.exit_all(kind.exit_code)
    return kind.exit_code


def _code_and_message(error: Exception) -> tuple[int, str]:
    """Returns exit code and message of an error; "" for a bug, which needs a traceback."""
    if hasattr(error, "exit_code"):
        return error.exit_code, str(error)
    hosts = sys.modules.get("disco_jax.run.hosts")
    if hosts and (message := hosts.peer_lost_message(error)):
        return hosts.LOST, message
    return 1, _storage_message(error)


def _storage_message(error: Exception) -> str:
    """Returns the user message for a full or read-only disk or an unreachable bucket, or ''."""
    from disco_jax import files

    if reason := files.bucket_error(error):
        return (
            f"A bucket cannot be used: {reason}. Check its name, the network and the credentials "
            "(`gcloud auth application-default login`), and start again. Files saved before are "
            "complete."
        )
    reason = files.refusal(error)
    return reason and (
        f"Nothing more can be written: {reason}. Files saved before are complete. Free some space "
        "or make the directory writable, and start again: a run resumes from its last checkpoint."
    )


def _start(name: str, argv: Sequence[str]) -> None:
    if name not in TASKS:
        raise errors.unknown("The task", name, TASKS)
    task = TASKS[name]
    module = f"disco_jax.commands.{task.module or name}"
    if task.config is None:
        importlib.import_module(module).main(argv)
        return
    from disco_jax import flags

    def check(config: Any, problems: errors.Problems) -> None:
        importlib.import_module(f"disco_jax.commands.{task.check}").check(config, problems)

    def choose(reference: str, run: str) -> str:
        from disco_jax.evaluate import protocols

        return protocols.choose(reference, run)

    values = flags.parse(
        name,
        argv,
        default_config=task.config,
        help_line=task.help,
        extra=lambda values: flags.define_further(values, task.flags),
        check=check if task.check else None,
        choose=choose if task.choose else None,
    )
    if values is not None:
        flags.prepare_jax(flags.distributed_options(values), values.workdir)
        further = {name: values[name].value for name in task.flags}
        importlib.import_module(module).run(values.config, values.workdir, **further)


def _set_up_logging(debug: bool) -> None:
    """Logs this package's messages from INFO on; those of libraries only with --debug."""
    absl_logging.set_verbosity(absl_logging.WARNING if debug else absl_logging.FATAL)
    if not debug:  # drops an exception that a thread of Orbax reports twice, without an object
        hook = sys.unraisablehook
        sys.unraisablehook = lambda event: hook(event) if event.object is not None else None
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger = logging.getLogger("disco_jax")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
