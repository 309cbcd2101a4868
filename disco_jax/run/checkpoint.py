"""Checkpoints with Orbax: asynchronous, atomic, verified, with keep-last-N and keep-best.

A checkpoint contains the whole state (weights, statistics, queues, optimizer), the step, the data
position of every host, and checksums of all of these, which detect damage that the storage format
does not detect. Leaves are saved as host arrays without a device axis, so a run can resume on any
number of devices. `stored.py` reads a single checkpoint.
"""

import dataclasses
import json
import logging
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from disco_jax import files
from disco_jax.errors import StorageError, UserError
from disco_jax.run import hosts, stored

_LOG = logging.getLogger(__name__)

FOLDER = "checkpoints"
DAMAGED = "checkpoints_damaged"
# Records the newest complete checkpoint, so that a start detects that all of them were lost.
SAVED = "saved.json"
_STEP = re.compile(r"0|[1-9]\d*")
_UNFINISHED = "orbax-checkpoint-tmp"  # part of the names of Orbax's unfinished checkpoints
_GOOD, _DAMAGED, _UNREADABLE, _OTHER_SHAPES = range(4)


class Stepped(Protocol):
    """A dataclass of array trees and a step: `state.TrainState`, or the state of a classifier."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def step(self) -> jax.Array: ...


State = TypeVar("State", bound=Stepped)


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, workdir: str, keep: int = 3, best_metric: str = ""):
        """Opens `workdir`/checkpoints and creates it if necessary.

        Args:
          workdir: the run's directory, local or gs://.
          keep: number of newest checkpoints to keep.
          best_metric: also keep the checkpoint with the lowest value of this metric; "": none.
        """
        policy = ocp.checkpoint_managers
        self._workdir = _absolute(workdir)
        self._best = _Best()
        self._best_metric = best_metric
        self._unrecorded: int | None = None
        hosts.on_process_zero(self._tidy)
        self._manager = ocp.CheckpointManager(
            self._workdir / FOLDER,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy.AnyPreservationPolicy(
                    [policy.LatestN(keep), *([self._best] if best_metric else [])]
                ),
                enable_async_checkpointing=True,
            ),
        )
        if best_metric:
            for step in self.steps():
                folder = self._workdir / FOLDER / str(step)
                self._best.values[step] = stored.metric_of(folder, step, best_metric)

    def save(
        self,
        step: int,
        state: Stepped,
        position: Sequence[Sequence[int]],
        metrics: Mapping[str, float],
    ) -> None:
        """Copies the state to the host, then writes a checkpoint in the background.

        Args:
          step: the step of the state.
          state: the state of the run; the caller has checked that it is finite.
          position: (epoch, offset) of each host's data.
          metrics: metrics of the last steps, for keep-best.
        """
        if step in self.steps():
            return
        self._record_saved()
        parts = _parts(jax.tree.map(np.asarray, jax.device_get(state)))
        metric = metrics[self._best_metric] if self._best_metric else None
        self._best.values[step] = metric
        meta = stored.describe(step, position, parts, metric)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in parts.items()},
                **{stored.META: ocp.args.JsonSave(meta)},
            ),
        )
        self._unrecorded = step

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, valid or not."""
        return list(self._manager.all_steps())

    def restore(
        self, like: State, newest: int | None = None
    ) -> tuple[State, dict[str, Any]] | None:
        """Restores the newest valid checkpoint; returns None if there are no checkpoints.

        Every process reads the whole checkpoint. If all processes find it damaged, they try the
        next older one. Damaged checkpoints are moved to `checkpoints_damaged` with a warning once
        an older checkpoint is valid; otherwise nothing is moved.

        Args:
          like: a state of the same shapes and dtypes.
          newest: ignore checkpoints of later steps; None: ignore none.

        Returns:
          The state as host arrays, and the metadata {"step", "position", ...}.

        Raises:
          UserError: all checkpoints are damaged, or the newest valid one contains a state of other
            shapes.
          StorageError: the storage cannot be read, or the processes disagree about a checkpoint.
        """
        parts = _parts(like)
        damaged: dict[int, str] = {}
        steps = sorted((s for s in self.steps() if newest is None or s <= newest), reverse=True)
        self._check_same(steps)
        for step in steps:
            checkpoint, reason = self._read(step, parts)
            if checkpoint is None:
                damaged[step] = reason
                continue
            for other, why in damaged.items():
                self._set_aside(other, why)
            restored, meta = checkpoint
            return dataclasses.replace(like, **restored, step=jnp.int32(step)), meta
        if damaged:
            raise UserError(
                f"All checkpoints in {self._workdir / FOLDER} are damaged: "
                + "; ".join(f"{step}: {why}" for step, why in damaged.items())
                + ". Nothing was moved. To start from step 0, give another --workdir."
            )
        return None

    def check_none_lost(self) -> None:
        """Checks that a directory without checkpoints never had any.

        Raises:
          UserError: the directory had checkpoints and all of them are gone.
        """
        if not self.steps():
            hosts.on_process_zero(self._check_never_saved)

    def wait(self) -> None:
        """Waits until all checkpoints are on the disk."""
        self._manager.wait_until_finished()
        self._record_saved()

    def close(self) -> None:
        """Waits, then releases the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _check_same(self, steps: Sequence[int]) -> None:
        """Checks that all processes see the same steps; they do not if each has its own disk."""
        checksums = hosts.all_gather(zlib.crc32(repr(list(steps)).encode()) % 2**31)
        if len(set(map(int, checksums))) > 1:
            raise UserError(
                f"The processes see different checkpoints in {self._workdir / FOLDER}; this one "
                f"sees steps {list(steps)}. --workdir must be a folder that all processes share."
            )

    def _tidy(self) -> None:
        """Warns about entries that are not checkpoints, and repairs files for Orbax."""
        folder = self._workdir / FOLDER
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; it must be the folder of a run's checkpoints.")
        for entry in folder.iterdir() if folder.exists() else ():
            if entry.name.isdecimal() and not entry.is_dir():
                self._set_aside_locally(entry.name, "a file instead of a folder")
            elif not _STEP.fullmatch(entry.name) and _UNFINISHED not in entry.name:
                _LOG.warning("%s is ignored: its name is not that of a checkpoint.", entry)
        self._repair_old_metrics()

    def _repair_old_metrics(self) -> None:
        """Empties damaged metrics files in checkpoints of earlier versions.

        Orbax reads these files when it opens the folder. Only keep-best uses them.
        """
        folder = self._workdir / FOLDER
        for entry in folder.iterdir() if folder.exists() else ():
            file = entry / stored.OLD_METRICS
            try:
                if file.exists():
                    files.read_json(file)
            except UserError as error:
                _LOG.warning("%s It was emptied; keep-best ignores this checkpoint.", error)
                with files.whole(file) as empty:
                    empty.write_text("{}")

    def _read(
        self, step: int, parts: Mapping[str, Any]
    ) -> tuple[tuple[dict[str, Any], dict[str, Any]] | None, str]:
        """Reads a checkpoint; returns None and the reason if all processes find it damaged."""
        checkpoint, reason, verdict = None, "", _GOOD
        failure: Exception | None = None
        try:
            checkpoint = stored.read(self._workdir / FOLDER, step, parts)
        except stored.Damaged as error:
            verdict, reason = _DAMAGED, str(error)
        except UserError as error:
            verdict, failure = _OTHER_SHAPES, error
        except Exception as error:  # of the storage; raised after all processes know of it
            verdict, failure = _UNREADABLE, error
        verdicts = [int(one) for one in hosts.all_gather(verdict)]
        if verdicts.count(verdict) < len(verdicts) or verdict == _UNREADABLE:
            raise self._storage_error(step, verdicts, failure) from failure
        if failure is not None:
            raise failure
        return checkpoint, reason

    def _storage_error(
        self, step: int, verdicts: Sequence[int], error: Exception | None
    ) -> StorageError:
        """Returns the error for an unreadable checkpoint or for verdicts that differ."""
        words = {_GOOD: "good", _DAMAGED: "damaged", _UNREADABLE: "cannot be read"}
        if len(verdicts) > 1:
            by_process = [
                f"process {i}: {words.get(v, 'other shapes')}" for i, v in enumerate(verdicts)
            ]
            reason = ", ".join(by_process) + (f" ({stored.first_line(error)})" if error else "")
        else:
            assert error is not None
            reason = stored.first_line(error)
        return StorageError(
            f"Checkpoint {step} in {self._workdir / FOLDER} could not be read: {reason}. It was "
            "not moved. Start again when the storage is available, or move "
            f"{step} out of the folder to resume from an older checkpoint."
        )

    def _set_aside(self, step: int, reason: str) -> None:
        hosts.on_process_zero(lambda: self._set_aside_locally(str(step), reason))
        self._best.values.pop(step, None)
        self._manager.reload()

    def _set_aside_locally(self, name: str, reason: str) -> None:
        target = self._workdir / DAMAGED / name
        target.parent.mkdir(parents=True, exist_ok=True)
        while target.exists():
            target = target.with_name(target.name + "_again")
        (self._workdir / FOLDER / name).rename(target)
        _LOG.warning(
            "Checkpoint %s is damaged (%s) and was moved to %s. The one before it is used.",
            name,
            reason,
            target,
        )

    def _record_saved(self) -> None:
        """Waits for the last checkpoint and records it in saved.json.

        This costs no extra time, since Orbax waits for one checkpoint before it begins the next.
        """
        step, self._unrecorded = self._unrecorded, None
        if step is None:
            return
        self._manager.wait_until_finished()
        if jax.process_index():
            return
        if "://" not in str(self._workdir):
            files.sync_tree(self._workdir / FOLDER / str(step))
        with files.whole(self._workdir / SAVED) as file:
            file.write_text(json.dumps({"newest": step}) + "\n")

    def _check_never_saved(self) -> None:
        saved = files.read_or_set_aside(self._workdir / SAVED)
        damaged = self._workdir / DAMAGED
        if saved is None and not (damaged.exists() and any(damaged.iterdir())):
            return
        newest = f" (the newest was step {saved.get('newest')})" if saved else ""
        raise UserError(
            f"--workdir={self._workdir} had checkpoints{newest}, but {FOLDER}/ has none now. "
            f"Restore them (damaged ones are in {DAMAGED}/), give another directory, or start "
            f"again at step 1: for a pretraining run with --allow-change={FOLDER}, for an "
            "evaluation with another --config.name."
        )


class _Best:
    """A preservation policy that keeps the checkpoint with the lowest metric.

    Attributes:
      values: step -> the metric, or None if it is unknown.
    """

    def __init__(self) -> None:
        self.values: dict[int, float | None] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Implements Orbax's `PreservationPolicy`."""
        metrics = {c.step: v for c in checkpoints if (v := self.values.get(c.step)) is not None}
        best = min(metrics, key=lambda step: (metrics[step], -step), default=None)
        return [c.step == best for c in checkpoints]


def load(workdir: str, part: str, like: Any) -> tuple[Any, int]:
    """Loads one part of the newest valid checkpoint of a run; changes nothing on the disk.

    Args:
      workdir: the run's directory.
      part: a field of `TrainState`: "student", "momentum" or "memory".
      like: a tree of the same shapes and dtypes.

    Returns:
      The tree, as host arrays, and its step.

    Raises:
      UserError: the run has no readable checkpoint.
    """
    folder = _absolute(workdir) / FOLDER
    steps = sorted(ocp.path.step.checkpoint_steps(folder), reverse=True)
    for step in steps:
        try:
            restored, _ = stored.read(folder, step, {part: like})
        except stored.Damaged as error:
            _LOG.warning("Checkpoint %d is damaged: %s", step, error)
            continue
        return restored[part], step
    raise UserError(f"{folder} has no readable checkpoint (steps on disk: {steps or 'none'}).")


def has(workdir: str, part: str) -> bool:
    """Returns whether the newest checkpoint of a run contains a part, e.g. "momentum".

    Returns true if there is no checkpoint, so that `load` reports the error.
    """
    folder = _absolute(workdir) / FOLDER
    steps = [entry for entry in folder.iterdir() if entry.name.isdigit()] if folder.exists() else []
    return not steps or (max(steps, key=lambda entry: int(entry.name)) / part).exists()


def _absolute(workdir: str) -> epath.Path:
    """Makes a local path absolute, as Orbax requires; returns URLs unchanged."""
    path = epath.Path(workdir)
    return path if "://" in str(workdir) else epath.Path(os.path.abspath(path))


def _parts(state: Stepped) -> dict[str, Any]:
    """Returns the fields of a state that contain arrays, without the step (see the metadata)."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: tree for name, tree in fields.items() if name != "step" and jax.tree.leaves(tree)}
