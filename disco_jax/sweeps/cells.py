"""Expansion of a sweep's config into the configs of its runs."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from disco_jax import errors, flags, methods, typed
from disco_jax.train.run_settings import RunSettings

FIELD = "config."  # prefix of axes that are fields; other axes are arguments of the recipe
RECIPE = "recipe"  # the axis over recipes
TEACHER = "teacher"  # the axis over `config.teachers`
SEED = "config.seed"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
      name: name of its directory, with its value on every axis.
      values: axis -> value, including the seed if there are several seeds.
      config: config of the run; the sweep may still have to train the teacher.
      teacher: name in `config.teachers`; "" without a teacher.
    """

    name: str
    values: Mapping[str, Any]
    config: ConfigDict
    teacher: str = ""

    @property
    def row(self) -> tuple[tuple[str, Any], ...]:
        """Values shared by cells that differ only in their seed."""
        return tuple((axis, value) for axis, value in self.values.items() if axis != SEED)


def expand(sweep: ConfigDict) -> list[Cell]:
    """Expands a sweep into all its cells, in the order of its axes.

    Args:
      sweep: see `configs/sweeps/common.py`.

    Raises:
      UserError: if an axis, a recipe or a field does not exist, or two cells have the same name.
    """
    products = [[_axis(*axis) for axis in axes] for axes in (sweep.axes, *sweep.further) if axes]
    seeds = [(SEED, tuple(sweep.seeds))] if len(sweep.seeds) > 1 else []
    if not products and not seeds:
        raise errors.UserError(
            "config.axes=() leaves nothing to sweep over: add an axis, or several config.seeds."
        )
    cells = []
    for axes in products or [[]]:
        for combination in itertools.product(*(values for _, values in (*axes, *seeds))):
            values = dict(zip((axis for axis, _ in (*axes, *seeds)), combination, strict=True))
            cells.append(_cell(sweep, values))
    names = [cell.name for cell in cells]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise errors.UserError(
            f"config.axes and config.further contain the cell {duplicates[0]!r} twice."
        )
    return cells


def teachers(sweep: ConfigDict, cells: Sequence[Cell]) -> dict[str, ConfigDict]:
    """Returns name -> pretraining config of every teacher that the sweep has to train.

    Raises:
      UserError: if a teacher has neither weights nor a recipe.
    """
    names = dict.fromkeys(cell.teacher for cell in cells if cell.teacher)
    configs = {}
    for name in names:
        spec = sweep.teachers[name]
        if spec.weights:
            continue
        if not spec.recipe:
            raise errors.UserError(
                f"config.teachers.{name}.weights is empty: set --config.teachers.{name}.weights to "
                "the workdir of a pretraining run or an import, or to a PyTorch checkpoint."
            )
        configs[name] = flags.changed(
            flags.load(spec.recipe), (*sweep.changes, *spec.changes), name
        )
    return configs


def _axis(axis: str, values: Sequence[Any]) -> tuple[str, tuple[Any, ...]]:
    if not isinstance(axis, str) or not isinstance(values, (list, tuple)) or not values:
        raise errors.UserError(
            f"config.axes: {axis!r} needs a name and its values, e.g. "
            "(('student', ('resnet18', 'resnet34')), ('config.student.hidden', (512, 2048)))."
        )
    return axis, tuple(tuple(v) if isinstance(v, list) else v for v in values)


def _cell(sweep: ConfigDict, values: Mapping[str, Any]) -> Cell:
    """Builds the cell for one value of every axis."""
    recipe = values.get(RECIPE, sweep.recipe)
    arguments = [f"{name}={value}" for name, value in sweep.arguments]
    fields, teacher = [], values.get(TEACHER, sweep.teacher)
    for axis, value in values.items():
        if axis.startswith(FIELD):
            fields.append((axis.removeprefix(FIELD), value))
        elif axis not in (RECIPE, TEACHER):
            arguments.append(f"{axis}={value}")

    def load(*further: str) -> ConfigDict:
        config = flags.load(flags.with_arguments(recipe, ",".join((*arguments, *further))))
        return flags.changed(config, (*sweep.changes, *fields), "config.axes")

    config = load()
    has_teacher = "teacher" in methods.plan(
        typed.parse(RunSettings, config).method
    )  # False for baselines
    if has_teacher and teacher:
        if teacher not in sweep.teachers:
            raise errors.unknown("The teacher of a cell", teacher, sweep.teachers)
        spec = sweep.teachers[teacher]
        config = load(f"teacher={spec.backbone}")
        config.teacher.weights = spec.weights
        config = flags.changed(config, spec.fields, f"config.teachers.{teacher}.fields")
    name = ",".join(f"{_short(axis)}={_slug(value)}" for axis, value in values.items())
    return Cell(name, dict(values), config, teacher if has_teacher else "")


def _short(axis: str) -> str:
    """Returns the last component of an axis."""
    return axis.rsplit(".", 1)[-1]


def _slug(value: Any) -> str:
    """Formats a value for the name of a directory."""
    return re.sub(r"[^\w.:=+-]+", "_", str(value)).strip("_") or "none"
