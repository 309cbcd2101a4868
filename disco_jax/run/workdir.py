"""The run directory: its ownership, its provenance, and exclusive access for one run at a time.

config.json       the resolved config
environment.json  versions, devices, git revision, command and seed of every start
data.json         number of images and a checksum of their names and sizes
saved.json        the newest complete checkpoint
metrics.jsonl     one line per log step
goodput.json      how the time was spent, over all starts
xla_cache/        compiled programs
profile/          requested traces
checkpoints/      see `checkpoint.py`
report.html       the results of the run, with figures/; see `report/build.py`

`docs/rundir.md` lists all files.
"""

import contextlib
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from disco_jax import files, programs
from disco_jax.errors import UserError, did_you_mean
from disco_jax.files import is_free, whole
from disco_jax.nested import flatten
from disco_jax.run import checkpoint, hosts, lease, metrics, upgrades
from disco_jax.version import __version__

_LOG = logging.getLogger(__name__)

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
DATA = "data.json"
# Values of --allow-change besides config fields: other images, and a start at step 1 in a directory
# that lost its checkpoints.
IMAGES, ANEW = "data", checkpoint.FOLDER
# Packages whose change between two starts causes a warning, because results may differ in the last
# bits.
_NUMERIC_PACKAGES = ("disco_jax", "jax", "jaxlib", "flax", "optax")
# Settings that may change between two starts of a run, because they do not affect training.
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
    workdir: str,
    config: ConfigDict,
    allow_change: Sequence[str] = (),
    images: Callable[[], Mapping[str, Any]] | None = None,
) -> Iterator[epath.Path]:
    """Claims `workdir` for this run while the context lasts.

    Writes config.json and data.json and appends to environment.json. With several processes, only
    process 0 does this.

    Args:
      workdir: the directory.
      config: the config of the run.
      allow_change: fields, or common prefixes of fields ("optimizer."), that may differ from the
        config with which the run began; "data" allows other images; "checkpoints" allows a start
        at step 1 although checkpoints were lost.
      images: returns a fingerprint of the run's images, see `Source.fingerprint`; None: the run
        reads no images.

    Yields:
      The path of the directory.

    Raises:
      UserError: the directory belongs to a run with another config or other images, contains
        something else, cannot be written, or is in use by another run.
    """
    path = epath.Path(workdir)
    with contextlib.ExitStack() as lock:
        hosts.on_process_zero(lambda: _claim(path, config, allow_change, images, lock))
        programs.settle(path)
        yield path


def begin_anew(path: epath.Path) -> None:
    """Renames files of earlier starts to NAME.before, for a run whose checkpoints are lost.

    With several processes, only process 0 does this.
    """

    def rename() -> None:
        for name in (checkpoint.SAVED, checkpoint.DAMAGED, metrics.FILE):
            if (path / name).exists():
                files.set_aside(path / name, "before")

    hosts.on_process_zero(rename)


def record(sections: Mapping[str, Any]) -> ConfigDict:
    """Returns the config that `claim` writes for a directory without a config of its own."""
    return ConfigDict(sections)


def read_config(workdir: str) -> ConfigDict:
    """Reads the config of the run in `workdir`, completed with fields of later versions.

    Raises:
      UserError: the directory contains no run, or its config is damaged.
    """
    file = epath.Path(workdir) / CONFIG
    if not file.exists():
        raise UserError(f"{workdir} is not a run directory: it has no {CONFIG}.")
    try:
        return upgrades.complete(ConfigDict(files.read_json(file)))
    except UserError as error:
        raise UserError(
            f"{error} Start the run again with its settings to write a new {CONFIG}."
        ) from error


def differences(old: ConfigDict, new: ConfigDict, allowed: Sequence[str] = ()) -> list[str]:
    """Returns a line "config.field: old -> new" for every changed field that must not change."""
    before, after = (flatten(json.loads(config.to_json_best_effort())) for config in (old, new))
    before = upgrades.completed(before, after)
    return [
        f"config.{key}: {before.get(key, '(absent)')!r} -> {after[key]!r}"
        for key in sorted(after)
        if before.get(key, before) != after[key] and not key.startswith((*FREE, *allowed))
    ]


def check_free(path: epath.Path, missing: str = "") -> None:
    """Checks that a directory contains no files of other programs.

    Args:
      path: the directory; it may be missing.
      missing: part of the message that says what a valid directory would contain.

    Raises:
      UserError: the directory contains other files, or is a file.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"--workdir={path} is a file; give a directory.")
    if not is_free(path):
        raise UserError(f"--workdir={path} is not empty{missing}. Give another directory.")


def _claim(
    path: epath.Path,
    config: ConfigDict,
    allow_change: Sequence[str],
    images: Callable[[], Mapping[str, Any]] | None,
    lock: contextlib.ExitStack,
) -> None:
    fields = [*flatten(config), IMAGES, ANEW]
    for field in allow_change:
        if not any(key.startswith(field) for key in fields):
            raise UserError(
                f"--allow-change={field} is not a field of the config.{did_you_mean(field, fields)}"
            )
    try:
        _check_owner(path, config, allow_change)
        path.mkdir(parents=True, exist_ok=True)
        lock.enter_context(lease.held(path))
        files.remove_unfinished(path)
        _check_owner(path, config, allow_change)  # again: another start may have been faster
        _check_images(path, images, allow_change)
        with whole(path / CONFIG) as file:
            file.write_text(config.to_json_best_effort(indent=2, sort_keys=True) + "\n")
        _record_environment(path, config)
    except OSError as error:
        raise UserError(f"--workdir={path} cannot be written: {error}.") from error


def _check_owner(path: epath.Path, config: ConfigDict, allow_change: Sequence[str]) -> None:
    if not (path / CONFIG).exists():
        if not _is_run(path):
            check_free(path, f" and holds no run ({CONFIG} is missing)")
        return
    try:
        old = ConfigDict(files.read_json(path / CONFIG))
    except UserError as error:
        _LOG.warning(
            "%s The current settings are assumed to be those with which the run began; the damaged "
            "file was renamed to %s.",
            error,
            files.set_aside(path / CONFIG).name,
        )
        return
    changed = differences(old, config, allow_change)
    if changed:
        raise UserError(
            f"--workdir={path} belongs to a run with another config. Changed fields:\n  "
            + "\n  ".join(changed)
            + "\nGive the old values to resume that run, give another --workdir, or confirm the "
            "change with --allow-change=FIELD[,FIELD...]."
        )


def _is_run(path: epath.Path) -> bool:
    """Returns whether a directory without a config belongs to a run whose config was damaged."""
    return any(path.glob(f"{CONFIG}.damaged*"))


def _check_images(
    path: epath.Path,
    images: Callable[[], Mapping[str, Any]] | None,
    allow_change: Sequence[str],
) -> None:
    """Checks that the images are those with which the run began, and records their fingerprint."""
    if images is None:
        return
    current = dict(images())
    before = files.read_or_set_aside(path / DATA)
    changed = [
        f"{name}: {before[name]} -> {current.get(name, '(absent)')}"
        for name in before or ()
        if before[name] != current.get(name)
    ]
    if changed and IMAGES in allow_change:
        _LOG.warning("The images differ from those of the last start: %s.", "; ".join(changed))
    elif changed:
        raise UserError(
            f"--workdir={path} belongs to a run with other images. Changed since it began:\n  "
            + "\n  ".join(changed)
            + "\nRestore the old images, give another --workdir, or confirm the change with "
            f"--allow-change={IMAGES}."
        )
    if changed or before is None:
        with whole(path / DATA) as file:
            file.write_text(json.dumps(current, indent=2) + "\n")


def _record_environment(path: epath.Path, config: ConfigDict) -> None:
    file = path / ENVIRONMENT
    starts = files.read_or_set_aside(file, list) or []
    current: dict[str, Any] = {
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
    if starts:
        _warn_of_versions(starts[-1], current)
    starts.append(current)
    with whole(file) as unfinished:
        unfinished.write_text(json.dumps(starts, indent=2) + "\n")


def _warn_of_versions(before: Any, current: Mapping[str, Any]) -> None:
    """Logs a warning if package versions have changed since the last start."""

    def versions(start: Any) -> dict[str, Any]:
        packages = start.get("packages") if isinstance(start, dict) else None
        return {**packages, "disco_jax": start.get("disco_jax")} if packages else {}

    old, new = versions(before), versions(current)
    changed = [
        f"{name} {old[name]} -> {new.get(name)}"
        for name in _NUMERIC_PACKAGES
        if name in old and old[name] != new.get(name)
    ]
    if changed:
        _LOG.warning(
            "Package versions have changed since the last start: %s. The run continues; its "
            "results may differ in the last bits.",
            ", ".join(changed),
        )


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Returns the git revision of this package, with "-dirty" if it has uncommitted changes.

    $DISCO_JAX_COMMIT overrides it, for installations from an archive of a commit. Returns None if
    the package is not in a git checkout.
    """
    if commit := os.environ.get("DISCO_JAX_COMMIT"):
        return commit
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
