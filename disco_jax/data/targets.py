"""What a teacher said of the crops of some epochs: kept batch by batch, read back beside them.

Crops and photometric operations are functions of the seed, the epoch and the place, so a later run
makes the same views again and takes the teacher's outputs from here.

targets.json                       what they belong to, see `tasks/cache.py`
host_00000_of_00001/000000.npz     some batches: their positions, bfloat16 outputs
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from disco_jax.data import base
from disco_jax.data.base import Position
from disco_jax.errors import UserError
from disco_jax.files import read_json, whole, write_arrays

FILE = "targets.json"
KEY = "teacher"  # in `HostBatch.aux`
_PART_BYTES = 64 * 2**20
_POSITIONS = "after"
Outputs = dict[int, dict[str, np.ndarray]]  # view -> name -> [b, D]


def size_bytes(outputs: Mapping[int, Mapping[str, int]], batch_size: int, steps: int) -> int:
    """What all hosts together keep.

    Args:
      outputs: view -> name -> D.
      batch_size: over all hosts.
      steps: of the epochs that are kept.
    """
    width = sum(dim for named in outputs.values() for dim in named.values())
    return 2 * width * batch_size * steps


class Writer:
    """One host's part, a file for some batches; what is there already stays.

    Attributes:
      steps: batches that are kept.
      position: where the next one starts.
    """

    def __init__(self, folder: epath.Path, host: int, hosts: int):
        """Opens what an earlier start has left.

        Args:
          folder: of all hosts.
          host, hosts: this one, and how many there are.
        """
        self._folder = _place(folder, host, hosts)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._pending: list[tuple[Position, dict[str, np.ndarray]]] = []
        after = _positions(self._folder)
        self.steps = len(after)
        self.position = after[-1] if after else Position.start()

    def add(self, after: Position, outputs: Outputs) -> None:
        """Keeps a batch; on the disk when enough have come together.

        Args:
          after: where the next batch starts.
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
        """Writes what is pending."""
        if not self._pending:
            return
        positions, rows = zip(*self._pending, strict=True)
        arrays = {name: np.stack([one[name] for one in rows]).view(np.uint16) for name in rows[0]}
        first = self.steps - len(self._pending)
        with whole(self._folder / f"{first:08d}.npz") as path, path.open("wb") as file:
            after = np.array([(p.epoch, p.offset) for p in positions])
            write_arrays(file, {_POSITIONS: after, **arrays})
        self._pending = []


class Targets:
    """One host's part, read.

    Attributes:
      meta: of targets.json.
      after: where the batch after each starts.
    """

    def __init__(self, folder: str, host: int, hosts: int):
        """Opens a finished folder.

        Raises:
          UserError: there is none, it is not finished, or of another number of hosts.
        """
        path = epath.Path(folder)
        self.meta = read_meta(folder)
        place = _place(path, host, hosts)
        self._parts = sorted(place.glob("*.npz"))
        self.after = _positions(place)
        if len(self.after) != self.meta["steps"]:
            raise UserError(
                f"config.teacher.cache={folder!r} holds {len(self.after)} of "
                f"{self.meta['steps']} batches of host {host} of {hosts}: run `disco-jax cache` "
                "to its end, with as many hosts as the training has."
            )
        self._firsts = [int(part.stem) for part in self._parts]
        self._load = functools.lru_cache(maxsize=2)(_load)
        starts = [Position.start(), *self.after[:-1]]
        self._of_start = {start: n for n, start in enumerate(starts)}

    def __len__(self) -> int:
        return len(self.after)

    @property
    def epochs(self) -> int:
        """That its batches reach into."""
        last = self.after[-1]
        return last.epoch + bool(last.offset)

    def number(self, start: Position) -> int:
        """Of the batch that starts at a position.

        Raises:
          UserError: there is none: the images are others.
        """
        if start not in self._of_start:
            raise self.other_images(start)
        return self._of_start[start]

    def other_images(self, position: Position) -> UserError:
        """Of a place at which no batch ended."""
        return UserError(
            f"config.teacher.cache knows of no batch that ends at epoch {position.epoch}, image "
            f"{position.offset}: the images are not those that it was made of."
        )

    def batch(self, number: int) -> Outputs:
        """view -> name -> bfloat16[b, D].

        Raises:
          UserError: the file is damaged.
        """
        part = int(np.searchsorted(self._firsts, number, side="right")) - 1
        arrays = self._load(self._parts[part])
        made: Outputs = {}
        for key, rows in arrays.items():
            if key != _POSITIONS:
                view, name = key.split("/")
                row = rows[number - self._firsts[part]].view(ml_dtypes.bfloat16)
                made.setdefault(int(view), {})[name] = row
        return made


class ReplayedSource:
    """A `base.Source` that reads the epochs of `Targets` again and again, with the outputs.

    `HostBatch.aux["teacher"]` has them. All but `train` is the wrapped source's.
    """

    def __init__(self, source: base.Source, targets: Targets):
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
    ) -> base.Batches:
        """Random resized crops; see `base.Source`."""
        kept, epochs = self._targets, self._targets.epochs
        round_, epoch = divmod(start.epoch, epochs)
        here = Position(epoch, start.offset)
        while True:
            first = kept.number(here)
            batches = self._source.train(split, views, batch_size, seed, here, max_unreadable)
            for number, batch in zip(range(first, len(kept)), batches, strict=False):
                if batch.position != kept.after[number]:
                    raise kept.other_images(batch.position)
                at = Position(round_ * epochs + batch.position.epoch, batch.position.offset)
                if number == len(kept) - 1:
                    at = Position((round_ + 1) * epochs, 0)
                aux = {**batch.aux, KEY: kept.batch(number)}
                yield batch._replace(aux=aux, position=at)
            batches.close()
            round_, here = round_ + 1, Position.start()


def read_meta(folder: str) -> dict[str, Any]:
    """What targets.json says.

    Raises:
      UserError: there is none.
    """
    file = epath.Path(folder) / FILE
    if not file.exists():
        raise UserError(
            f"config.teacher.cache={folder!r} holds no {FILE}; `disco-jax cache` makes such a "
            "folder."
        )
    return read_json(file)


def write_meta(folder: epath.Path, meta: Mapping[str, Any]) -> None:
    """Writes targets.json."""
    with whole(folder / FILE) as file:
        file.write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n")


def _place(folder: epath.Path, host: int, hosts: int) -> epath.Path:
    return folder / f"host_{host:05d}_of_{hosts:05d}"


def _positions(place: epath.Path) -> list[Position]:
    """Where the batch after each starts, over all files in their order."""
    found: list[Position] = []
    for part in sorted(place.glob("*.npz")):
        if int(part.stem) != len(found):
            break  # one in between was lost
        found += [Position(int(e), int(o)) for e, o in _load(part, only=_POSITIONS)[_POSITIONS]]
    return found


def _load(part: epath.Path, only: str = "") -> dict[str, np.ndarray]:
    """The arrays of a file, or one of them."""
    try:
        with part.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ([only] if only else arrays.files)}
    except Exception as error:  # whatever a damaged archive makes the readers raise
        raise UserError(f"{part} is damaged ({error}): remove it and run `disco-jax cache`.") from (
            error
        )
