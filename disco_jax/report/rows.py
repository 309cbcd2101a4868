"""Cells of the papers' tables and figures, each with the config and the evaluation that make it.

The cells themselves are data, in `configs/papers/`. `disco-jax reproduce` lists and runs them.
"""

import dataclasses
import functools
import importlib
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from disco_jax import errors, flags
from disco_jax.nested import flatten

PAPERS = "papers"  # subfolder of the configs
Changes = tuple[tuple[str, Any], ...]  # ((field, value), ...)

RUNS, DRAWN, MISSING = "runs", "drawn from other cells", "missing"
# Number of training images of the papers' data sets.
IMAGES = {"imagenet2012": 1_281_167}


def _load(reference: str) -> ConfigDict:
    """Returns a copy of a recipe's config; many cells share one."""
    return _loaded(reference).copy_and_resolve_references()


@functools.cache
def _loaded(reference: str) -> ConfigDict:
    return flags.load(reference)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Pre-trained network that teaches, as a paper describes it.

    Attributes:
      backbone: a name in `models.BACKBONES`.
      about: its pre-training, e.g. "MoCo-v2, 200 epochs".
      recipe: reference of the recipe of that pre-training; "": the package cannot repeat it.
      shape: without a recipe, reference of one whose network and normalisation are the same.
      changes: fields that differ from `recipe`.
      network: the network of that run that teaches.
      file: name of the published weights; "" if there are none.
      top1: linear evaluation on ImageNet that the paper gives, in percent.
      row: id of the cell that trains it; "" if there is none.
    """

    backbone: str
    about: str
    recipe: str = ""
    shape: str = ""
    changes: Changes = ()
    network: str = "student"
    file: str = ""
    top1: float | None = None
    row: str = ""

    def config(self) -> ConfigDict:
        """Returns the config of its pre-training, or one with the same network."""
        return flags.changed(
            _load(self.recipe or self.shape), self.changes, f"teacher {self.about}"
        )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Evaluation by which a paper scores a network.

    Attributes:
      reference: task and arguments, e.g. "linear:protocol=disco,student=resnet18".
      changes: fields that differ from that recipe.
    """

    reference: str
    changes: Changes = ()

    @property
    def task(self) -> str:
        """Name of the command."""
        return self.reference.partition(":")[0]

    def config(self) -> ConfigDict:
        """Returns the config of the evaluation."""
        return flags.changed(_load(self.reference), self.changes, self.reference)


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell of a table or figure.

    Attributes:
      id: place in the paper, e.g. "disco/table1/resnet18/resnet50".
      recipe: reference of the recipe that trains the network, with all arguments.
      evaluation: how the network is scored; None for a figure that is drawn from other cells.
      changes: fields that differ from `recipe`.
      teacher: None without one.
      printed: metric of the evaluation ("top1", "top5") -> value in the paper, in percent. {}: the
        value is only drawn, or lost in our copy of the paper.
      source: paper and place of `printed`, e.g. "DisCo (2104.09124), Table 1".
      missing: what this package lacks to run it; "" if it runs.
      note: settings that the paper leaves open, or a remark on the value.
      command: for figures, the command that draws them from the results of other cells.
    """

    id: str
    recipe: str = ""
    evaluation: Evaluation | None = None
    changes: Changes = ()
    teacher: Teacher | None = None
    printed: Mapping[str, float] = dataclasses.field(default_factory=dict)
    source: str = ""
    missing: str = ""
    note: str = ""
    command: str = ""

    @property
    def arguments(self) -> Mapping[str, str]:
        """Arguments of its recipe, e.g. {"student": "resnet18"}."""
        pairs = (pair.partition("=") for pair in self.recipe.partition(":")[2].split(","))
        return {name: value for name, _, value in pairs}

    @property
    def table(self) -> str:
        """Id of its table, e.g. "disco/table1"."""
        return "/".join(self.id.split("/")[:2])

    @property
    def state(self) -> str:
        """One of `RUNS`, `DRAWN` and `MISSING`."""
        if self.missing:
            return MISSING
        return DRAWN if self.command else RUNS

    def config(self, smoke: bool = False) -> ConfigDict:
        """Returns the config of its training, whose teacher still lacks weights.

        Args:
          smoke: limit it to two steps on small images, with a random teacher. Changes of fields
            that such a run sets to small numbers are left out.
        """
        full = _load(self.recipe)
        if not smoke:
            return flags.changed(full, self.changes, self.id)
        config = _load(flags.with_arguments(self.recipe, "smoke=true"))
        fields, smoke_fields = flatten(full), flatten(config)
        changes = [change for change in self.changes if _same(change[0], fields, smoke_fields)]
        return flags.changed(config, changes, self.id)


def _same(field: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return bool(first.get(field) == second.get(field))


@dataclasses.dataclass(frozen=True)
class Table:
    """Table, figure or protocol of a paper.

    Attributes:
      id: e.g. "disco/table1".
      title: source and subject, e.g. "DisCo (2104.09124), Table 1: linear evaluation".
      rows: its cells.
    """

    id: str
    title: str
    rows: tuple[Row, ...]


def table(name: str, source: str, about: str, rows: Iterable[Row]) -> Table:
    """Returns a table whose rows get its id as prefix, and its source if they have none.

    Args:
      name: id of the table, e.g. "disco/table1".
      source: paper and place, e.g. "DisCo (2104.09124), Table 1".
      about: subject of the table.
      rows: cells whose ids lack the prefix.
    """
    cells = tuple(
        dataclasses.replace(row, id=f"{name}/{row.id}", source=row.source or source) for row in rows
    )
    return Table(name, f"{source}: {about}", cells)


@functools.cache
def tables() -> Mapping[str, Table]:
    """Returns id -> table, of all papers."""
    place = pathlib.Path(importlib.import_module(f"{flags.CONFIGS}.{PAPERS}").__path__[0])
    entries: dict[str, Table] = {}
    for file in sorted(place.glob("*.py")):
        module = importlib.import_module(f"{flags.CONFIGS}.{PAPERS}.{file.stem}")
        if hasattr(module, "tables"):
            entries |= {entry.id: entry for entry in module.tables()}
    return entries


@functools.cache
def rows() -> Mapping[str, Row]:
    """Returns id -> cell, of all papers in the order of their tables."""
    return {row.id: row for entry in tables().values() for row in entry.rows}


def below(prefix: str) -> list[Row]:
    """Returns the cells whose id is `prefix` or begins with it and a slash.

    Raises:
      UserError: there are none; the message names the nearest ids.
    """
    prefix = prefix.strip("/")
    matches = [row for row in rows().values() if f"{row.id}/".startswith(f"{prefix}/")]
    if not matches:
        raise errors.UserError(_unknown(prefix))
    return matches


def find(name: str) -> Row:
    """Returns a cell by its id.

    Raises:
      UserError: it is unknown, or the id of a whole table; the message names cells.
    """
    if name in rows():
        return rows()[name]
    cells = [row.id for row in below(name)]
    raise errors.UserError(
        f"{name} has {len(cells)} cells; give one of them: {errors.listed(cells, _SEE)}."
    )


_SEE = "disco-jax reproduce"


def _unknown(name: str) -> str:
    """Returns the message for an id that does not exist."""
    near = nearest(name)
    return f"The row {errors.shown(name)} is not known. Nearest: {', '.join(near)}. See `{_SEE}`."


def nearest(name: str, most: int = 3) -> Sequence[str]:
    """Returns the ids of the tables and cells most similar to `name`, the best first."""
    import difflib

    ids = [*tables(), *rows()]
    name = name[: errors.VALUE_LENGTH]
    return difflib.get_close_matches(name, ids, n=most, cutoff=0.0)
