"""`disco-jax TASK [flags]`: flags -> config -> one task. No logic of its own.

A task is a module in `tasks/` with a `run` function and a line in `TASKS`.
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
    """What is told of a task before its module is imported.

    Attributes:
      help: one line.
      config: the recipe taken when --config is not given; "": it must be; None: the task reads
        its flags itself.
      module: in `tasks/`; "": of the task's name.
      flags: of `flags.FURTHER`, given to the task's `run` by name.
      check: in `tasks/`: a module whose `check` notes what is wrong with the config.
    """

    help: str
    config: str | None
    module: str = ""
    flags: tuple[str, ...] = ()
    check: str = ""


# Told here so that the help and mistaken flags need no task's imports.
TASKS = {
    "pretrain": Task(
        "pretrain or distil a student: any method, from one config",
        "",
        flags=("profile", "allow_change"),
        check="prepare",
    ),
    "distill": Task("distil a student from your images and a teacher, settings chosen", None),
    "sweep": Task("many runs from one config, and their table", None),
    "cache": Task("keep what a teacher says, for students that come later", None),
    "plan": Task("memory, speed and hours of a config on a TPU slice, without one", None),
    "knn": Task("classify held-out images by a run's nearest neighbours", "configs/knn.py"),
    "linear": Task("train and test a linear classifier on frozen features", "configs/linear.py"),
    "bags": Task("images that a teacher finds alike: neighbours, clusters", "configs/bags.py"),
    "semi": Task("classify with 1 % or 10 % of the labels", "configs/semi.py", "linear"),
    "transfer": Task("classify another data set, linearly", "configs/transfer.py", "linear"),
    "finetune": Task("train all layers with labels", "configs/finetune.py", "linear"),
    "fewshot": Task("ridge regression on a few images of every class", "configs/fewshot.py"),
    "plane": Task("the information plane along a fine-tuning", "configs/plane.py"),
    "tsne": Task("draw ten classes as runs arrange them", "configs/tsne.py"),
    "cost": Task("parameters, operations and latency beside accuracy", "configs/cost.py"),
    "report": Task("one page of a run: curves, results, views, settings, time", None),
    "compare": Task("several runs in one table and page", None),
    "data": Task("check a data set: counts, classes, sizes, unreadable images, speed", None),
    "import": Task("a PyTorch checkpoint into a run directory", None, "importing"),
    "export": Task("a network to PyTorch, Detectron2, ONNX, TFLite or StableHLO", None),
    "embed": Task("features of a folder of images, with their file names", None),
    "demo": Task("what the quick start runs: teacher, baseline and DisCo", "configs/demo.py"),
    "list": Task("the recipes, networks, objectives and data sets there are", None),
}

USAGE = """usage: disco-jax TASK [flags]

{tasks}

Flags of most tasks:
  --config FILE[:key=value,...]   a recipe, e.g. configs/disco.py:student=resnet18
  --config.FIELD=VALUE            change any field of it
  --workdir DIR                   where the run lives
  --distributed                   several processes: meet the others first. TPU pods, SLURM and
                                  Open MPI tell who they are; elsewhere give to each
                                  --coordinator HOST:PORT --processes N --process I
  --debug                         tracebacks, and the warnings of libraries

`disco-jax TASK --help` shows a task's own; `disco-jax --version` the version.
Exit codes: 0 done, 1 crash, 2 a setting or input, 3 not finite, 75 stopped by SIGTERM or SIGHUP,
130 by Ctrl-C; a training saves its last step first (a second Ctrl-C ends it at once);
134 another process of the run was lost. A reader of the output that ends first (`| head`, a closed
terminal's pipe) changes none of them: the command goes on to its end, and what it says is dropped.
"""


def console() -> None:
    """The console script."""
    streams.protect()
    _set_up_logging(debug="--debug" in sys.argv)
    code = main(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:  # a full disk, which Python would tell with a traceback
        print(f"disco-jax: standard output: {error.strerror}", file=sys.stderr)
        code = code or 1
        sys.stdout = sys.__stdout__
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Runs one task; returns the exit code.

    Args:
      argv: the words after `disco-jax`.
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
        return _ended(argv[0], error)
    except Exception as error:
        code, said = _told(error)
        if debug or not said:
            traceback.print_exc()
        else:
            print(f"disco-jax {argv[0]}: {said}", file=sys.stderr)
        if hosts := sys.modules.get("disco_jax.train.hosts"):
            hosts.leave(code)
        return code
    return 0


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end a command in order, as Ctrl-C does.

    Only the main thread hears signals. What is ignored, as SIGHUP under `nohup`, stays so.
    """

    def end(*_: Any) -> None:
        raise errors.Terminated

    numbers = []
    if threading.current_thread() is threading.main_thread():
        # Several processes that have met hear SIGTERM through JAX, and agree on a step.
        numbers = [signal.SIGHUP] if _has_met() else [signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.getsignal(number) for number in numbers}
    heard = {number: old for number, old in before.items() if old != signal.SIG_IGN}
    for number in heard:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, old in heard.items():
            signal.signal(number, old)


def _has_met() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _ended(task: str, error: BaseException) -> int:
    """Tells of a signal that came while there was nothing to save; returns the exit code."""
    kind = errors.Interrupted if isinstance(error, KeyboardInterrupt) else errors.Preempted
    print(
        f"disco-jax {task}: Asked to stop. What was saved before is whole; start again to go on.",
        file=sys.stderr,
    )
    if hosts := sys.modules.get("disco_jax.train.hosts"):
        hosts.leave(kind.exit_code)
    return kind.exit_code


def _told(error: Exception) -> tuple[int, str]:
    """Exit code and message of an error; no message of a defect, which needs a traceback."""
    if hasattr(error, "exit_code"):
        return error.exit_code, str(error)
    hosts = sys.modules.get("disco_jax.train.hosts")
    if hosts and (said := hosts.lost(error)):
        return hosts.LOST, said
    return 1, _of_storage(error)


def _of_storage(error: Exception) -> str:
    """What to tell of a disk that is full or not to be written; "" if it is something else."""
    from disco_jax import files

    said = files.refusal(error)
    return said and (
        f"Nothing more can be written: {said}. What was saved before is whole. Make room, or let "
        "it be written, and start again: a run goes on from its last checkpoint."
    )


def _start(name: str, argv: Sequence[str]) -> None:
    if name not in TASKS:
        raise errors.unknown("The task", name, TASKS)
    task = TASKS[name]
    module = f"disco_jax.tasks.{task.module or name}"
    if task.config is None:
        importlib.import_module(module).main(argv)
        return
    from disco_jax import flags

    def check(config: Any, problems: errors.Problems) -> None:
        importlib.import_module(f"disco_jax.tasks.{task.check}").check(config, problems)

    values = flags.parse(
        name,
        argv,
        default_config=task.config,
        help_line=task.help,
        extra=lambda values: flags.define_further(values, task.flags),
        check=check if task.check else None,
    )
    if values is not None:
        flags.prepare_jax(flags.meeting(values), values.workdir)
        further = {name: values[name].value for name in task.flags}
        importlib.import_module(module).run(values.config, values.workdir, **further)


def _set_up_logging(debug: bool) -> None:
    """Our own messages from INFO on; those of libraries only if asked for."""
    absl_logging.set_verbosity(absl_logging.WARNING if debug else absl_logging.FATAL)
    if not debug:  # nor what a thread of Orbax says a second time, in nobody's name
        known = sys.unraisablehook
        sys.unraisablehook = lambda told: known(told) if told.object is not None else None
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger = logging.getLogger("disco_jax")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
