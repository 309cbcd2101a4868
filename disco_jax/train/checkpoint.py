"""Checkpoints with Orbax: asynchronous, atomic, verified, keep-last-N and keep-best.

A checkpoint holds the whole state (weights, statistics, queues, optimizer), the step, where every
host stands in the data, and checksums of all of it, so that a damaged file is noticed even where
the storage format would not notice. Leaves are saved as host arrays without a device axis: any
number of devices can read them. `stored.py` reads one.
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
from disco_jax.train import hosts, stored

_LOG = logging.getLogger(__name__)

FOLDER = "checkpoints"
DAMAGED = "checkpoints_damaged"
# Notes the newest checkpoint that was ever complete, so that a start notices when all are gone.
SAVED = "saved.json"
_STEP = re.compile(r"0|[1-9]\d*")
_UNFINISHED = "orbax-checkpoint-tmp"  # in names that Orbax gives to what it has not finished
_GOOD, _DAMAGED, _UNREADABLE, _OTHER_SHAPES = range(4)


class Stepped(Protocol):
    """A dataclass of trees of arrays and a step: `state.TrainState`, or that of a classifier."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def step(self) -> jax.Array: ...


State = TypeVar("State", bound=Stepped)


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, workdir: str, keep: int = 3, best_metric: str = ""):
        """Opens `workdir`/checkpoints, making it if need be.

        Args:
          workdir: the run's directory, local or gs://.
          keep: how many of the newest checkpoints stay.
          best_metric: the checkpoint with the lowest value of this metric stays too; "": none.
        """
        policy = ocp.checkpoint_managers
        self._workdir = _absolute(workdir)
        self._best = _Best()
        self._best_metric = best_metric
        self._unnoted: int | None = None
        hosts.first(self._tidy)
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
                place = self._workdir / FOLDER / str(step)
                self._best.values[step] = stored.metric_of(place, step, best_metric)

    def save(
        self,
        step: int,
        state: Stepped,
        position: Sequence[Sequence[int]],
        metrics: Mapping[str, float],
    ) -> None:
        """Writes a checkpoint in the background; returns when the state has been copied.

        Args:
          step: the state's.
          state: of the run; finite, which the caller has checked.
          position: (epoch, offset) of each host's data.
          metrics: of the last steps, for keep-best.
        """
        if step in self.steps():
            return
        self._note()
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
        self._unnoted = step

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints that there are, good or not."""
        return list(self._manager.all_steps())

    def restore(
        self, like: State, newest: int | None = None
    ) -> tuple[State, dict[str, Any]] | None:
        """Returns the newest good checkpoint, or None if there is none at all.

        Every process reads the whole checkpoint, and what becomes of it is what all of them find.
        One that all find damaged is passed over, and moved to `checkpoints_damaged` with a warning
        as soon as an older one proves to be good. Nothing is moved otherwise.

        Args:
          like: a state of the same shapes and dtypes.
          newest: checkpoints of later steps are left alone; None: there are none such.

        Returns:
          The state, as host arrays, and {"step", "position", ...}.

        Raises:
          UserError: if there are checkpoints and none of them is good, or the newest good one is
            of a state of other shapes.
          StorageError: the storage does not let one be read, or not all processes find the same.
        """
        parts = _parts(like)
        damaged: dict[int, str] = {}
        steps = sorted((s for s in self.steps() if newest is None or s <= newest), reverse=True)
        self._check_same(steps)
        for step in steps:
            found, reason = self._read(step, parts)
            if found is None:
                damaged[step] = reason
                continue
            for other, why in damaged.items():
                self._set_aside(other, why)
            restored, meta = found
            return dataclasses.replace(like, **restored, step=jnp.int32(step)), meta
        if damaged:
            raise UserError(
                f"No checkpoint in {self._workdir / FOLDER} can be read: "
                + "; ".join(f"{step}: {why}" for step, why in damaged.items())
                + ". Nothing was moved. To start afresh, give another --workdir."
            )
        return None

    def check_none_lost(self) -> None:
        """Refuses to begin a run anew in a directory that once had checkpoints and has none.

        Raises:
          UserError: there were some.
        """
        if not self.steps():
            hosts.first(self._refuse_lost)

    def wait(self) -> None:
        """Returns when everything asked for is on the disk."""
        self._manager.wait_until_finished()
        self._note()

    def close(self) -> None:
        """Waits, then releases the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _check_same(self, steps: Sequence[int]) -> None:
        """Refuses processes that see other checkpoints, as on disks of their own."""
        seen = hosts.everyone(zlib.crc32(repr(list(steps)).encode()) % 2**31)
        if len(set(map(int, seen))) > 1:
            raise UserError(
                f"The processes see other checkpoints in {self._workdir / FOLDER}; this one sees "
                f"steps {list(steps)}. --workdir must be a folder that all of them share."
            )

    def _tidy(self) -> None:
        """Tells of what is no checkpoint among them, and mends what Orbax cannot read."""
        folder = self._workdir / FOLDER
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; it must be the folder of a run's checkpoints.")
        for entry in folder.iterdir() if folder.exists() else ():
            if entry.name.isdecimal() and not entry.is_dir():
                self._set_aside_here(entry.name, "a file in its place")
            elif not _STEP.fullmatch(entry.name) and _UNFINISHED not in entry.name:
                _LOG.warning("%s is no checkpoint by its name, and is passed over.", entry)
        self._mend_old_metrics()

    def _mend_old_metrics(self) -> None:
        """Replaces damaged metrics in checkpoints of earlier versions, which Orbax reads at once.

        They decide about keep-best alone.
        """
        folder = self._workdir / FOLDER
        for place in folder.iterdir() if folder.exists() else ():
            file = place / stored.OLD_METRICS
            try:
                if file.exists():
                    files.read_json(file)
            except UserError as error:
                _LOG.warning("%s It is taken as empty: keep-best passes it over.", error)
                with files.whole(file) as empty:
                    empty.write_text("{}")

    def _read(
        self, step: int, parts: Mapping[str, Any]
    ) -> tuple[tuple[dict[str, Any], dict[str, Any]] | None, str]:
        """Returns a checkpoint; None and the reason where all processes find it damaged."""
        found, reason, verdict = None, "", _GOOD
        refused: Exception | None = None
        try:
            found = stored.read(self._workdir / FOLDER, step, parts)
        except stored.Damaged as error:
            verdict, reason = _DAMAGED, str(error)
        except UserError as error:
            verdict, refused = _OTHER_SHAPES, error
        except Exception as error:  # of the storage; told when all know of it
            verdict, refused = _UNREADABLE, error
        verdicts = [int(one) for one in hosts.everyone(verdict)]
        if verdicts.count(verdict) < len(verdicts) or verdict == _UNREADABLE:
            raise self._unread(step, verdicts, refused) from refused
        if refused is not None:
            raise refused
        return found, reason

    def _unread(self, step: int, verdicts: Sequence[int], error: Exception | None) -> StorageError:
        """Returns the error of a checkpoint that is neither good nor damaged for all."""
        words = {_GOOD: "good", _DAMAGED: "damaged", _UNREADABLE: "cannot be read"}
        if len(verdicts) > 1:
            told = [f"process {i}: {words.get(v, 'other shapes')}" for i, v in enumerate(verdicts)]
            reason = ", ".join(told) + (f" ({stored.first_line(error)})" if error else "")
        else:
            assert error is not None
            reason = stored.first_line(error)
        return StorageError(
            f"Checkpoint {step} in {self._workdir / FOLDER} could not be read: {reason}. It was "
            "left where it is. Start again when the storage answers; to go on from an older one, "
            f"move {step} out of the folder."
        )

    def _set_aside(self, step: int, reason: str) -> None:
        hosts.first(lambda: self._set_aside_here(str(step), reason))
        self._best.values.pop(step, None)
        self._manager.reload()

    def _set_aside_here(self, name: str, reason: str) -> None:
        target = self._workdir / DAMAGED / name
        target.parent.mkdir(parents=True, exist_ok=True)
        while target.exists():
            target = target.with_name(target.name + "_again")
        (self._workdir / FOLDER / name).rename(target)
        _LOG.warning(
            "Checkpoint %s is damaged (%s); moved to %s. The one before is taken.",
            name,
            reason,
            target,
        )

    def _note(self) -> None:
        """Notes the last checkpoint that was begun, which is complete now.

        Orbax waits for one checkpoint before it begins the next.
        """
        step, self._unnoted = self._unnoted, None
        if step is None:
            return
        self._manager.wait_until_finished()
        if jax.process_index():
            return
        if "://" not in str(self._workdir):
            files.sync_tree(self._workdir / FOLDER / str(step))
        with files.whole(self._workdir / SAVED) as file:
            file.write_text(json.dumps({"newest": step}) + "\n")

    def _refuse_lost(self) -> None:
        noted = files.read_or_set_aside(self._workdir / SAVED)
        aside = self._workdir / DAMAGED
        if noted is None and not (aside.exists() and any(aside.iterdir())):
            return
        newest = f", the newest of step {noted.get('newest')}" if noted else ""
        raise UserError(
            f"--workdir={self._workdir} has had checkpoints{newest}, and none is left in "
            f"{FOLDER}/. Bring them back (damaged ones are in {DAMAGED}/), give another directory, "
            f"or begin anew at step 1: a pretraining with --allow-change={FOLDER}, an evaluation "
            "with another --config.name."
        )


class _Best:
    """Preserves the checkpoint with the lowest metric.

    Attributes:
      values: step -> the metric, as far as it is known.
    """

    def __init__(self) -> None:
        self.values: dict[int, float | None] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """See Orbax's `PreservationPolicy`."""
        known = {c.step: v for c in checkpoints if (v := self.values.get(c.step)) is not None}
        best = min(known, key=lambda step: (known[step], -step), default=None)
        return [c.step == best for c in checkpoints]


def load(workdir: str, part: str, like: Any) -> tuple[Any, int]:
    """Returns one part of the newest good checkpoint of a run; changes nothing on the disk.

    Args:
      workdir: the run's directory.
      part: a field of `TrainState`: "student", "momentum" or "memory".
      like: a tree of the same shapes and dtypes.

    Returns:
      The tree, as host arrays, and its step.

    Raises:
      UserError: if no checkpoint there can be read.
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
    raise UserError(f"{folder} holds no readable checkpoint (found steps: {steps or 'none'}).")


def has(workdir: str, part: str) -> bool:
    """Whether the newest checkpoint of a run holds a part, e.g. "momentum".

    True where there is no checkpoint: that is for `load` to complain about.
    """
    folder = _absolute(workdir) / FOLDER
    steps = [entry for entry in folder.iterdir() if entry.name.isdigit()] if folder.exists() else []
    return not steps or (max(steps, key=lambda entry: int(entry.name)) / part).exists()


def _absolute(workdir: str) -> epath.Path:
    """Orbax takes no relative paths; an object store's have no other form."""
    path = epath.Path(workdir)
    return path if "://" in str(workdir) else epath.Path(os.path.abspath(path))


def _parts(state: Stepped) -> dict[str, Any]:
    """The fields of a state that hold arrays, but for the step, which the metadata keeps."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: tree for name, tree in fields.items() if name != "step" and jax.tree.leaves(tree)}
