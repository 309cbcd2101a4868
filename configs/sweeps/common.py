"""Fields of sweeps with their defaults, claims and teachers."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict


def sweep(name: str) -> ConfigDict:
    """Returns every field of a sweep.

    Args:
      name: title of the table.
    """
    config = ConfigDict()
    config.name = name
    config.recipe = ""  # the recipe of each cell: "disco" or "disco:data=fashion_mnist"
    # ((axis, values), ...): one cell for each combination. An axis is an argument of the recipe
    # ("student"), a field ("config.student.hidden"), "recipe", or "teacher": a name of `teachers`.
    config.axes = ()
    config.further = ()  # additional products of axes; their cells follow those of `axes`
    config.arguments = ()  # ((argument, value), ...) for the recipe of each cell
    config.seeds = (0,)  # one run a cell and seed; the table shows means and deviations
    config.changes = ()  # ((field, value), ...) for all cells and for the teachers trained here
    config.teacher = ""  # the teacher of all cells, unless it is an axis
    config.teachers = {}  # name -> `teacher`
    # Evaluations that score each run: "linear", or (reference, ((field, value), ...)). "linear"
    # without a protocol is the probe of the paper of each run's recipe, for its network.
    config.evaluate = ("linear", "knn")
    config.joint = 8  # most students that share a teacher and train in one step
    # Figure: x is the axis along x ("": bars; "parameters" and "teacher_parameters": sizes of the
    # student and of the teacher), score the evaluation; other axes become lines.
    config.figure = dict(x="", score="linear")
    config.curves = ()  # metrics of the runs along their steps, e.g. ("loss", "knn/top1")
    config.claims = {}  # name -> `claim`; the page shows above the table whether they hold
    return config


def claim(
    says: str,
    better: Sequence[tuple[str, Any]],
    worse: Sequence[tuple[str, Any]],
    at_least: bool = False,
    most: Sequence[Any] = (),
) -> dict[str, Any]:
    """Returns an entry of a sweep's `claims`: some rows of its table score higher than others.

    Rows are selected by ((axis, value), ...). Two rows are compared if they have the same values
    of all axes that neither selection names.

    Args:
      says: the claim as a sentence.
      better: selects the rows that score higher.
      worse: selects the rows that score lower.
      at_least: whether an equal score suffices.
      most: (axis, value): claims instead that the gain is largest at this value of the axis.
    """
    return dict(says=says, better=better, worse=worse, at_least=at_least, most=most)


def teacher(
    backbone: str,
    weights: str = "",
    recipe: str = "",
    changes: Sequence[tuple[str, Any]] = (),
    fields: Sequence[tuple[str, Any]] = (),
) -> dict[str, Any]:
    """Returns an entry of a sweep's `teachers`.

    Args:
      backbone: a backbone, e.g. "resnet50".
      weights: see `config.teacher.weights`; "": the sweep trains the teacher first.
      recipe: the recipe of that training, e.g. "moco_v2:student=resnet50".
      changes: ((field, value), ...) for that training; they override the sweep's `changes`.
      fields: ((field, value), ...) for the runs that it teaches.
    """
    return dict(backbone=backbone, weights=weights, recipe=recipe, changes=changes, fields=fields)
