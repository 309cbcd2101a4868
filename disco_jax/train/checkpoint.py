"""Checkpoints with Orbax: asynchronous, atomic, verified, keep-last-N and keep-best.

A checkpoint holds the whole state (weights, statistics, queues, optimizer), the step, where every
host stands in the data, and a checksum of every part, so that a damaged file is noticed even
where the storage format would not notice. Leaves are saved as host arrays without a device axis:
any number of devices can read them.
"""

import dataclasses
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from disco_jax.errors import UserError

_LOG = logging.getLogger(__name__)

FOLDER = "checkpoints"
DAMAGED = "checkpoints_damaged"
_META = "meta"


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
        preserve, best = [policy.LatestN(keep)], {}
        if best_metric:
            preserve.append(policy.BestN(get_metric_fn=lambda m: m[best_metric], reverse=True, n=1))
            # Also what makes a manager that is opened again read the metrics of old checkpoints.
            best = {"best_fn": lambda m: m[best_metric], "best_mode": "min"}
        self._workdir = _absolute(workdir)
        self._best_metric = best_metric
        self._manager = ocp.CheckpointManager(
            self._workdir / FOLDER,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy.AnyPreservationPolicy(preserve),
                enable_async_checkpointing=True,
                **best,
            ),
        )

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
        parts = _parts(jax.tree.map(np.asarray, jax.device_get(state)))
        meta = {
            "step": step,
            "position": [list(map(int, p)) for p in position],
            "checksums": {name: _checksum(tree) for name, tree in parts.items()},
            "shapes": {name: _shapes(tree) for name, tree in parts.items()},
        }
        best = {self._best_metric: metrics[self._best_metric]} if self._best_metric else None
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in parts.items()},
                **{_META: ocp.args.JsonSave(meta)},
            ),
            metrics=best,
        )

    def steps(self) -> list[int]:
        """Of the checkpoints that there are, good or not."""
        return list(self._manager.all_steps())

    def restore(
        self, like: State, newest: int | None = None
    ) -> tuple[State, dict[str, Any]] | None:
        """The newest good checkpoint, or None if there is none.

        A checkpoint that cannot be read, or whose checksum does not match, is moved to
        `checkpoints_damaged` with a warning, and the next older one is tried.

        Args:
          like: a state of the same shapes and dtypes.
          newest: checkpoints of later steps are left alone; None: there are none such.

        Returns:
          The state, as host arrays, and {"step", "position", ...}.

        Raises:
          UserError: if there are checkpoints and none of them is good, or the newest good one is
            of a state of other shapes.
        """
        parts = _parts(like)
        damaged = []
        steps = [s for s in self.steps() if newest is None or s <= newest]
        for step in sorted(steps, reverse=True):
            try:
                restored, meta = _read(self._manager, step, parts)
            except UserError:
                raise  # nothing is wrong with the file
            except Exception as error:  # whatever a damaged file makes the storage layers raise
                aside = self._set_aside(step)
                damaged.append(str(aside))
                _LOG.warning(
                    "Checkpoint %d is damaged (%s); moved to %s. Trying the one before.",
                    step,
                    _first_line(error),
                    aside,
                )
                continue
            return dataclasses.replace(like, **restored, step=jnp.int32(step)), meta
        if damaged:
            raise UserError(
                f"No checkpoint in {self._workdir / FOLDER} can be read; all were moved to "
                f"{self._workdir / DAMAGED}. To start afresh, give another --workdir."
            )
        return None

    def wait(self) -> None:
        """Returns when everything asked for is on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """`wait`, then release the background threads."""
        self._manager.close()

    def _set_aside(self, step: int) -> epath.Path:
        target = self._workdir / DAMAGED / str(step)
        target.parent.mkdir(parents=True, exist_ok=True)
        while target.exists():
            target = target.with_name(target.name + "_again")
        if jax.process_index() == 0:
            (self._workdir / FOLDER / str(step)).rename(target)
        self._manager.reload()
        return target


def load(workdir: str, part: str, like: Any) -> tuple[Any, int]:
    """One part of the newest good checkpoint of a run, without changing anything on the disk.

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
    steps = []
    if folder.exists():
        with ocp.CheckpointManager(folder) as manager:
            steps = sorted(manager.all_steps(), reverse=True)
            for step in steps:
                try:
                    restored, _ = _read(manager, step, {part: like})
                except UserError:
                    raise
                except Exception as error:
                    _LOG.warning("Checkpoint %d is damaged: %s", step, _first_line(error))
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


def _read(
    manager: ocp.CheckpointManager, step: int, parts: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parts of a checkpoint, verified, and its metadata; raises if anything is off."""
    args = ocp.args.Composite(**{_META: ocp.args.JsonRestore()})
    shapes = manager.restore(step, args=args)[_META].get("shapes", {})
    other = [name for name in parts if shapes and shapes.get(name) != _shapes(parts[name])]
    if other:
        raise UserError(
            f"Checkpoint {step} is of a run whose {' and '.join(other)} has other shapes: the "
            "config has changed. Give the old values to go on, or another --workdir."
        )
    abstract = jax.tree.map(lambda x: np.zeros(np.shape(x), x.dtype), dict(parts))
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()},
            **{_META: ocp.args.JsonRestore()},
        ),
    )
    meta = restored[_META]
    for name in parts:
        if _checksum(restored[name]) != meta["checksums"][name]:
            raise ValueError(f"the checksum of {name!r} does not match")
    return {name: restored[name] for name in parts}, meta


def _shapes(tree: Any) -> int:
    """CRC-32 over the place, shape and dtype of every leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    told = [(jax.tree_util.keystr(path), np.shape(x), str(x.dtype)) for path, x in leaves]
    return zlib.crc32(repr(told).encode())


def _checksum(tree: Any) -> int:
    """CRC-32 over the bytes of every leaf, in the order of the tree."""
    value = 0
    for leaf in jax.tree.leaves(tree):
        # As bytes: Python's buffers know no bfloat16.
        value = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, value)
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
