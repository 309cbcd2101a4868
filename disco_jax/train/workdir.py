"""The run directory: whose it is, what made it, and that one run at a time writes to it.

config.json       the resolved config
environment.json  versions, devices, git revision, command, seed, of every start
metrics.jsonl     one line a log step
goodput.json      where the time went, over all starts
xla_cache/        compiled programs
profile/          traces that were asked for
checkpoints/      see `checkpoint.py`
report.html       what the run came to, with figures/; see `report/build.py`

`docs/rundir.md` draws all of it.
"""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence

import jax
from etils import epath
from ml_collections import ConfigDict

from disco_jax import programs
from disco_jax.errors import UserError, did_you_mean
from disco_jax.files import LOCK, is_free, whole
from disco_jax.nested import flatten
from disco_jax.train import hosts
from disco_jax.version import __version__

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
# Settings that may change between two starts of a run: they do not change what is learned.
FREE = (
    "log.",
    "monitor.",
    "checkpoint.",
    "data.dir",
    "data.cache",
    "data.max_unreadable",
)
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "ml-collections",
    "clu",
    "chex",
    "numpy",
    "tensorflow",
    "tensorflow-cpu",
    "tensorflow-datasets",
)


@contextlib.contextmanager
def claim(
    workdir: str, config: ConfigDict, allow_change: Sequence[str] = ()
) -> Iterator[epath.Path]:
    """Makes `workdir` this run's, for as long as the context lasts.

    Writes config.json and appends to environment.json. Of several processes the first does it.

    Args:
      workdir: the directory.
      config: of the run.
      allow_change: fields, or the beginnings of several ("optimizer."), that may differ from what
        the run began with.

    Raises:
      UserError: when the directory belongs to a run of another config, holds something else,
        cannot be written, or another run is writing to it.
    """
    path = epath.Path(workdir)
    with contextlib.ExitStack() as held:
        hosts.first(lambda: _take(path, config, allow_change, held))
        programs.settle(path)
        yield path


def read_config(workdir: str) -> ConfigDict:
    """The config of the run in `workdir`.

    Raises:
      UserError: when there is no run.
    """
    file = epath.Path(workdir) / CONFIG
    if not file.exists():
        raise UserError(f"{workdir} is not a run directory: it has no {CONFIG}.")
    return ConfigDict(json.loads(file.read_text()))


def differences(old: ConfigDict, new: ConfigDict, allowed: Sequence[str] = ()) -> list[str]:
    """A line "config.field: old -> new" for every field that matters, differs and may not."""
    old, new = (flatten(json.loads(config.to_json_best_effort())) for config in (old, new))
    return [
        f"config.{key}: {old.get(key, '(absent)')!r} -> {new.get(key, '(absent)')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith((*FREE, *allowed))
    ]


def check_free(path: epath.Path, missing: str = "") -> None:
    """Refuses a directory that holds what this package did not put there.

    Args:
      path: the directory, which need not exist.
      missing: for the message: what else it would have to hold.

    Raises:
      UserError: it is not free, or a file.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"--workdir={path} is a file; give a directory.")
    if not is_free(path):
        raise UserError(f"--workdir={path} is not empty{missing}. Give another directory.")


def _take(
    path: epath.Path, config: ConfigDict, allow_change: Sequence[str], held: contextlib.ExitStack
) -> None:
    known = flatten(config)
    for field in allow_change:
        if not any(key.startswith(field) for key in known):
            raise UserError(
                f"--allow-change={field} is no field of the config.{did_you_mean(field, known)}"
            )
    _check_owner(path, config, allow_change)
    try:
        path.mkdir(parents=True, exist_ok=True)
        held.enter_context(_lock(path))
        with whole(path / CONFIG) as file:
            file.write_text(config.to_json_best_effort(indent=2, sort_keys=True) + "\n")
        _note_environment(path, config)
    except OSError as error:
        raise UserError(f"--workdir={path} cannot be written: {error}.") from error


def _check_owner(path: epath.Path, config: ConfigDict, allow_change: Sequence[str]) -> None:
    if not (path / CONFIG).exists():
        check_free(path, f" and holds no run ({CONFIG} is missing)")
        return
    changed = differences(read_config(path), config, allow_change)
    if changed:
        raise UserError(
            f"--workdir={path} belongs to a run of another config. Changed since:\n  "
            + "\n  ".join(changed)
            + "\nGive the old values to go on with that run, another --workdir, or, if this is "
            "meant, --allow-change=FIELD[,FIELD...]."
        )


@contextlib.contextmanager
def _lock(path: epath.Path) -> Iterator[None]:
    """Holds a local directory against a second process; the lock ends with this process."""
    if "://" in str(path):
        yield
        return
    with open(path / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another run is writing to --workdir={path}. Wait for it or give another."
            ) from None
        yield


def _note_environment(path: epath.Path, config: ConfigDict) -> None:
    file = path / ENVIRONMENT
    starts = json.loads(file.read_text()) if file.exists() else []
    starts.append(
        {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "seed": config.get("seed"),
            "disco_jax": __version__,
            "git": _git_revision(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "devices": [str(device) for device in jax.devices()],
            "processes": jax.process_count(),
            "packages": {name: v for name in _PACKAGES if (v := _installed(name))},
        }
    )
    with whole(file) as unfinished:
        unfinished.write_text(json.dumps(starts, indent=2) + "\n")


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The revision of the checkout that this package runs from, "-dirty" with changes in it.

    Where it was installed from an archive of a commit, $DISCO_JAX_COMMIT says of which.
    """
    if given := os.environ.get("DISCO_JAX_COMMIT"):
        return given
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=epath.Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
