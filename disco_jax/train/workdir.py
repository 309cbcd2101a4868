"""The run directory: whose it is, what made it, and that one run at a time writes to it.

config.json       the resolved config
environment.json  versions, devices, git revision, command, seed, of every start
data.json         how many images the run reads, and a checksum over their names and sizes
saved.json        the newest checkpoint that was complete
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
from disco_jax.train import checkpoint, hosts, lease, metrics, upgrades
from disco_jax.version import __version__

_LOG = logging.getLogger(__name__)

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
DATA = "data.json"
# What --allow-change takes beside fields of the config: other images, and a start at step 1 where
# there were checkpoints and none is left.
IMAGES, ANEW = "data", checkpoint.FOLDER
# Versions whose change between two starts is told: they may compute another last bit.
_TOLD = ("disco_jax", "jax", "jaxlib", "flax", "optax")
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
    workdir: str,
    config: ConfigDict,
    allow_change: Sequence[str] = (),
    images: Callable[[], Mapping[str, Any]] | None = None,
) -> Iterator[epath.Path]:
    """Makes `workdir` this run's, for as long as the context lasts.

    Writes config.json and data.json and appends to environment.json. Of several processes the
    first does it.

    Args:
      workdir: the directory.
      config: of the run.
      allow_change: fields, or the beginnings of several ("optimizer."), that may differ from what
        the run began with; "data": the images, too; "checkpoints": they may be gone.
      images: returns what tells the images of the run from others; see `Source.fingerprint`.
        None: it reads none.

    Raises:
      UserError: when the directory belongs to a run of another config or of other images, holds
        something else, cannot be written, or another run is writing to it.
    """
    path = epath.Path(workdir)
    with contextlib.ExitStack() as held:
        hosts.first(lambda: _take(path, config, allow_change, images, held))
        programs.settle(path)
        yield path


def begin_anew(path: epath.Path) -> None:
    """Renames what earlier starts have left of a run whose checkpoints are gone, to NAME.before.

    Of several processes the first does it.
    """

    def rename() -> None:
        for name in (checkpoint.SAVED, checkpoint.DAMAGED, metrics.FILE):
            if (path / name).exists():
                files.set_aside(path / name, "before")

    hosts.first(rename)


def read_config(workdir: str) -> ConfigDict:
    """Returns the config of the run in `workdir`, with the fields that came since it began.

    Raises:
      UserError: when there is no run, or its config is damaged.
    """
    file = epath.Path(workdir) / CONFIG
    if not file.exists():
        raise UserError(f"{workdir} is not a run directory: it has no {CONFIG}.")
    try:
        return upgrades.complete(ConfigDict(files.read_json(file)))
    except UserError as error:
        raise UserError(
            f"{error} Start the run again with its settings: that writes it anew."
        ) from error


def differences(old: ConfigDict, new: ConfigDict, allowed: Sequence[str] = ()) -> list[str]:
    """Returns a line "config.field: old -> new" for every field that differs and may not."""
    before, after = (flatten(json.loads(config.to_json_best_effort())) for config in (old, new))
    before = upgrades.completed(before, after)
    return [
        f"config.{key}: {before.get(key, '(absent)')!r} -> {after[key]!r}"
        for key in sorted(after)
        if before.get(key, before) != after[key] and not key.startswith((*FREE, *allowed))
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
    path: epath.Path,
    config: ConfigDict,
    allow_change: Sequence[str],
    images: Callable[[], Mapping[str, Any]] | None,
    held: contextlib.ExitStack,
) -> None:
    known = [*flatten(config), IMAGES, ANEW]
    for field in allow_change:
        if not any(key.startswith(field) for key in known):
            raise UserError(
                f"--allow-change={field} is no field of the config.{did_you_mean(field, known)}"
            )
    try:
        _check_owner(path, config, allow_change)
        path.mkdir(parents=True, exist_ok=True)
        held.enter_context(lease.held(path))
        files.remove_unfinished(path)
        _check_owner(path, config, allow_change)  # another start may have been before this one
        _check_images(path, images, allow_change)
        with whole(path / CONFIG) as file:
            file.write_text(config.to_json_best_effort(indent=2, sort_keys=True) + "\n")
        _note_environment(path, config)
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
            "%s The settings given now are taken to be those that the run began with; the damaged "
            "file is kept as %s.",
            error,
            files.set_aside(path / CONFIG).name,
        )
        return
    changed = differences(old, config, allow_change)
    if changed:
        raise UserError(
            f"--workdir={path} belongs to a run of another config. Changed since:\n  "
            + "\n  ".join(changed)
            + "\nGive the old values to go on with that run, another --workdir, or, if this is "
            "meant, --allow-change=FIELD[,FIELD...]."
        )


def _is_run(path: epath.Path) -> bool:
    """Whether a directory without a config is a run's all the same, whose config was damaged."""
    return any(path.glob(f"{CONFIG}.damaged*"))


def _check_images(
    path: epath.Path,
    images: Callable[[], Mapping[str, Any]] | None,
    allow_change: Sequence[str],
) -> None:
    """Refuses other images than those that the run began with, and notes those of now."""
    if images is None:
        return
    now = dict(images())
    before = files.read_or_set_aside(path / DATA)
    changed = [
        f"{name}: {before[name]} -> {now.get(name, '(absent)')}"
        for name in before or ()
        if before[name] != now.get(name)
    ]
    if changed and IMAGES in allow_change:
        _LOG.warning("The images are others than before: %s.", "; ".join(changed))
    elif changed:
        raise UserError(
            f"--workdir={path} belongs to a run of other images. Changed since it began:\n  "
            + "\n  ".join(changed)
            + "\nBring the old ones back, give another --workdir, or, if this is meant, "
            f"--allow-change={IMAGES}."
        )
    if changed or before is None:
        with whole(path / DATA) as file:
            file.write_text(json.dumps(now, indent=2) + "\n")


def _note_environment(path: epath.Path, config: ConfigDict) -> None:
    file = path / ENVIRONMENT
    starts = files.read_or_set_aside(file, list) or []
    now: dict[str, Any] = {
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
        _tell_versions(starts[-1], now)
    starts.append(now)
    with whole(file) as unfinished:
        unfinished.write_text(json.dumps(starts, indent=2) + "\n")


def _tell_versions(before: Any, now: Mapping[str, Any]) -> None:
    """Warns where a start has other versions than the one before it."""

    def versions(start: Any) -> dict[str, Any]:
        packages = start.get("packages") if isinstance(start, dict) else None
        return {**packages, "disco_jax": start.get("disco_jax")} if packages else {}

    old, new = versions(before), versions(now)
    changed = [f"{n} {old[n]} -> {new.get(n)}" for n in _TOLD if n in old and old[n] != new.get(n)]
    if changed:
        _LOG.warning(
            "Other versions than at the last start: %s. The run goes on; its last bits may be "
            "others.",
            ", ".join(changed),
        )


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
