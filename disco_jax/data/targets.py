"""A disk cache of teacher outputs for the crops of some epochs.

Crops and photometric operations are functions of the seed, the epoch and the position, so a later
run recreates the same views and reads the teacher's outputs from the cache.

targets.json                       metadata, see `commands/cache.py`
host_00000_of_00001/000000.npz     a few batches: their positions and bfloat16 outputs
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from disco_jax.data import contract
from disco_jax.data.contract import Position
from disco_jax.errors import UserError
from disco_jax.files import read_json, whole, write_arrays

FILE = "targets.json"
KEY = "teacher"  # in `HostBatch.aux`
_PART_BYTES = 64 * 2**20
_POSITIONS = "after"
Outputs = dict[int, dict[str, np.ndarray]]  # view -> name -> [b, D]


def size_bytes(outputs: Mapping[int, Mapping[str, int]], batch_size: int, steps: int) -> int:
    """Returns the size of the cache in bytes over all hosts.

    Args:
      outputs: view -> name -> D, the dimension of the output.
      batch_size: batch size over all hosts.
      steps: number of cached steps.
    """
    width = sum(dim for named in outputs.values() for dim in named.values())
    return 2 * width * batch_size * steps


class Writer:
    """Writes the cache of one host, a few batches per file; continues an existing cache.

    Attributes:
      steps: number of cached batches.
      position: start of the next batch.
    """

    def __init__(self, folder: epath.Path, host: int, hosts: int):
        """Opens the cache at the position where an earlier start ended.

        Args:
          folder: folder of all hosts.
          host: index of this host.
          hosts: number of hosts.
        """
        self._folder = _host_folder(folder, host, hosts)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._pending: list[tuple[Position, dict[str, np.ndarray]]] = []
        after = _positions(self._folder)
        self.steps = len(after)
        self.position = after[-1] if after else Position.start()

    def add(self, after: Position, outputs: Outputs) -> None:
        """Adds a batch; writes a file once enough batches are pending.

        Args:
          after: start of the next batch.
          outputs: view -> name -> float[b, D].
        """
        rows = {
            f"{view}/{name}": np.asarray(rows, ml_dtypes.bfloat16)
            for view, named in outputs.items()
            for name, rows in named.items()
        }
        self._pending.append((after, rows))
        self.position = after
        self.steps += 1
        if len(self._pending) * sum(x.nbytes for x in rows.values()) >= _PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes the pending batches to a file."""
        if not self._pending:
            return
        positions, rows = zip(*self._pending, strict=True)
        arrays = {
            name: np.stack([arrays_of_batch[name] for arrays_of_batch in rows]).view(np.uint16)
            for name in rows[0]
        }
        first = self.steps - len(self._pending)
        with whole(self._folder / f"{first:08d}.npz") as path, path.open("wb") as file:
            after = np.array([(p.epoch, p.offset) for p in positions])
            write_arrays(file, {_POSITIONS: after, **arrays})
        self._pending = []


class Targets:
    """Reads the cache of one host.

    Attributes:
      meta: contents of targets.json.
      after: position after each batch.
    """

    def __init__(self, folder: str, host: int, hosts: int):
        """Opens a complete cache.

        Raises:
          UserError: the cache does not exist, is incomplete, or was written by another number of
            hosts.
        """
        path = epath.Path(folder)
        self.meta = read_meta(folder)
        host_folder = _host_folder(path, host, hosts)
        self._parts = sorted(host_folder.glob("*.npz"))
        self.after = _positions(host_folder)
        if len(self.after) != self.meta["steps"]:
            raise UserError(
                f"config.teacher.cache={folder!r} holds {len(self.after)} of "
                f"{self.meta['steps']} batches of host {host} of {hosts}: run `disco-jax cache` "
                "to its end, with the same number of hosts as the training."
            )
        self._firsts = [int(part.stem) for part in self._parts]
        self._load = functools.lru_cache(maxsize=2)(_load)
        starts = [Position.start(), *self.after[:-1]]
        self._index_by_start = {start: n for n, start in enumerate(starts)}

    def __len__(self) -> int:
        return len(self.after)

    @property
    def epochs(self) -> int:
        """Number of epochs covered by the batches, rounded up."""
        last = self.after[-1]
        return last.epoch + bool(last.offset)

    def number(self, start: Position) -> int:
        """Returns the index of the batch that starts at a position.

        Raises:
          UserError: no batch starts there, so the images have changed.
        """
        if start not in self._index_by_start:
            raise self.other_images(start)
        return self._index_by_start[start]

    def other_images(self, position: Position) -> UserError:
        """Returns the error for a position at which no cached batch ends."""
        return UserError(
            f"config.teacher.cache has no batch that ends at epoch {position.epoch}, image "
            f"{position.offset}: the images differ from those it was computed from."
        )

    def batch(self, number: int) -> Outputs:
        """Loads a batch as view -> name -> bfloat16[b, D].

        Raises:
          UserError: the file is damaged.
        """
        index = int(np.searchsorted(self._firsts, number, side="right")) - 1
        arrays = self._load(self._parts[index])
        outputs: Outputs = {}
        for key, rows in arrays.items():
            if key != _POSITIONS:
                view, name = key.split("/")
                row = rows[number - self._firsts[index]].view(ml_dtypes.bfloat16)
                outputs.setdefault(int(view), {})[name] = row
        return outputs


class ReplayedSource:
    """A `contract.Source` that repeats the epochs of `Targets` and adds the cached outputs.

    The outputs are in `HostBatch.aux["teacher"]`. Everything except `train` is delegated to the
    wrapped source.
    """

    def __init__(self, source: contract.Source, targets: Targets):
        self._source, self._targets = source, targets

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def train(
        self,
        split: str,
        views: Mapping[int, Any],
        batch_size: int,
        seed: int,
        start: Position,
        max_unreadable: int,
    ) -> contract.Batches:
        """Yields batches of random resized crops; see `contract.Source`."""
        targets, epochs = self._targets, self._targets.epochs
        cycle, epoch = divmod(start.epoch, epochs)
        position = Position(epoch, start.offset)
        while True:
            first = targets.number(position)
            batches = self._source.train(split, views, batch_size, seed, position, max_unreadable)
            for number, batch in zip(range(first, len(targets)), batches, strict=False):
                if batch.position != targets.after[number]:
                    raise targets.other_images(batch.position)
                after = Position(cycle * epochs + batch.position.epoch, batch.position.offset)
                if number == len(targets) - 1:
                    after = Position((cycle + 1) * epochs, 0)
                aux = {**batch.aux, KEY: targets.batch(number)}
                yield batch._replace(aux=aux, position=after)
            batches.close()
            cycle, position = cycle + 1, Position.start()


def read_meta(folder: str) -> dict[str, Any]:
    """Reads targets.json.

    Raises:
      UserError: the file does not exist.
    """
    file = epath.Path(folder) / FILE
    if not file.exists():
        raise UserError(
            f"config.teacher.cache={folder!r} has no {FILE}; create the folder with "
            "`disco-jax cache`."
        )
    return read_json(file)


def write_meta(folder: epath.Path, meta: Mapping[str, Any]) -> None:
    """Writes targets.json."""
    with whole(folder / FILE) as file:
        file.write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n")


def _host_folder(folder: epath.Path, host: int, hosts: int) -> epath.Path:
    return folder / f"host_{host:05d}_of_{hosts:05d}"


def _positions(host_folder: epath.Path) -> list[Position]:
    """Returns the position after each batch, over all files in order."""
    positions: list[Position] = []
    for part in sorted(host_folder.glob("*.npz")):
        if int(part.stem) != len(positions):
            break  # a file in between is missing
        positions += [Position(int(e), int(o)) for e, o in _load(part, only=_POSITIONS)[_POSITIONS]]
    return positions


def _load(part: epath.Path, only: str = "") -> dict[str, np.ndarray]:
    """Loads the arrays of a file, or only one of them."""
    try:
        with part.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ([only] if only else arrays.files)}
    except Exception as error:  # the readers raise many exceptions for a damaged archive
        raise UserError(f"{part} is damaged ({error}): remove it and run `disco-jax cache`.") from (
            error
        )
