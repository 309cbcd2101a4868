"""From a sweep's config to the configs of its runs."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from disco_jax import errors, flags, methods
from disco_jax.nested import flatten

FIELD = "config."  # begins the axes that are fields; the others are arguments of the recipe
RECIPE = "recipe"  # the axis over recipes
TEACHER = "teacher"  # the axis over `config.teachers`
SEED = "config.seed"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
      name: of its directory: what it has of every axis.
      values: axis -> value, with the seed among them if there are several.
      config: of the run; the teacher's weights may still have to be made.
      teacher: of `config.teachers`; "" without one.
    """

    name: str
    values: Mapping[str, Any]
    config: ConfigDict
    teacher: str = ""

    @property
    def row(self) -> tuple[tuple[str, Any], ...]:
        """What cells that differ in their seed alone share."""
        return tuple((axis, value) for axis, value in self.values.items() if axis != SEED)


def expand(sweep: ConfigDict) -> list[Cell]:
    """All cells of a sweep, in the order of its axes.

    Args:
      sweep: see `common.sweep`.

    Raises:
      UserError: an axis, a recipe or a field is not there, or two cells have one name.
    """
    products = [[_axis(*axis) for axis in axes] for axes in (sweep.axes, *sweep.further) if axes]
    seeds = [(SEED, tuple(sweep.seeds))] if len(sweep.seeds) > 1 else []
    if not products and not seeds:
        raise errors.UserError("config.axes=() leaves nothing to sweep over.")
    cells = []
    for axes in products or [[]]:
        for chosen in itertools.product(*(values for _, values in (*axes, *seeds))):
            values = dict(zip((axis for axis, _ in (*axes, *seeds)), chosen, strict=True))
            cells.append(_cell(sweep, values))
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise errors.UserError(f"config.axes and config.further give {twice[0]!r} twice.")
    return cells


def teachers(sweep: ConfigDict, cells: Sequence[Cell]) -> dict[str, ConfigDict]:
    """name -> config of the pretraining of every teacher that cells use and a sweep has to make.

    Raises:
      UserError: a teacher has neither weights nor a recipe.
    """
    wanted = dict.fromkeys(cell.teacher for cell in cells if cell.teacher)
    made = {}
    for name in wanted:
        spec = sweep.teachers[name]
        if spec.weights:
            continue
        if not spec.recipe:
            raise errors.UserError(
                f"config.teachers.{name}.weights is empty: give the workdir of a pretraining run "
                f"or of an import, or a PyTorch checkpoint, with --config.teachers.{name}.weights."
            )
        made[name] = changed(flags.load(spec.recipe), (*sweep.changes, *spec.changes), name)
    return made


def _axis(axis: str, values: Sequence[Any]) -> tuple[str, tuple[Any, ...]]:
    if not isinstance(axis, str) or not isinstance(values, (list, tuple)) or not values:
        raise errors.UserError(
            f"config.axes: {axis!r} needs a name and its values, e.g. "
            "(('student', ('resnet18', 'resnet34')), ('config.student.hidden', (512, 2048)))."
        )
    return axis, tuple(tuple(v) if isinstance(v, list) else v for v in values)


def _cell(sweep: ConfigDict, values: Mapping[str, Any]) -> Cell:
    """The cell of one value of every axis."""
    recipe = values.get(RECIPE, sweep.recipe)
    arguments = [f"{name}={value}" for name, value in sweep.arguments]
    fields, teacher = [], values.get(TEACHER, sweep.teacher)
    for axis, value in values.items():
        if axis.startswith(FIELD):
            fields.append((axis.removeprefix(FIELD), value))
        elif axis not in (RECIPE, TEACHER):
            arguments.append(f"{axis}={value}")

    def load(*further: str) -> ConfigDict:
        config = flags.load(_with(recipe, (*arguments, *further)))
        return changed(config, (*sweep.changes, *fields), "config.axes")

    config = load()
    taught = "teacher" in methods.plan(config)  # a baseline has none
    if taught and teacher:
        if teacher not in sweep.teachers:
            raise errors.unknown("The teacher of a cell", teacher, sweep.teachers)
        spec = sweep.teachers[teacher]
        config = load(f"teacher={spec.backbone}")
        config.teacher.weights = spec.weights
        config = changed(config, spec.fields, f"config.teachers.{teacher}.fields")
    name = ",".join(f"{_short(axis)}={_told(value)}" for axis, value in values.items())
    return Cell(name, dict(values), config, teacher if taught else "")


def _with(recipe: str, arguments: Sequence[str]) -> str:
    """A recipe's reference with further arguments; later ones win."""
    name, _, given = recipe.partition(":")
    every = [*filter(None, given.split(",")), *arguments]
    return name + (":" + ",".join(every) if every else "")


def changed(config: ConfigDict, changes: Sequence[tuple[str, Any]], where: str) -> ConfigDict:
    """`config` with other values of some fields.

    Raises:
      UserError: a field is not there, or of another type.
    """
    known = flatten(config)
    for field, value in changes:
        if field not in known:
            near = errors.did_you_mean(field, known)
            raise errors.UserError(f"{where}: config.{field} is no field of the config.{near}")
        try:
            config.update_from_flattened_dict({field: value})
        except (TypeError, ValueError) as error:
            raise errors.UserError(f"{where}: config.{field}={value!r}: {error}") from error
    return config


def _short(axis: str) -> str:
    """The last word of an axis."""
    return axis.rsplit(".", 1)[-1]


def _told(value: Any) -> str:
    """A value as a part of a directory's name."""
    return re.sub(r"[^\w.:=+-]+", "_", str(value)).strip("_") or "none"
