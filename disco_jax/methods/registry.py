"""Registry of objectives: the classes of this package, and a user's own by `module:Class`.

Every frozen dataclass in a module of `disco_jax.methods` that derives from `Objective` is an
objective. Its name in the config is the class name in snake case, and its fields are its section.
"""

import dataclasses
import functools
import importlib
import pkgutil
import re
from collections.abc import Mapping
from typing import Any

from disco_jax import errors
from disco_jax.methods.base import Objective, config_fields

# The field of a section that names a class outside this package.
CLASS = "cls"


@functools.cache
def objectives() -> dict[str, type[Objective]]:
    """Returns the objectives of this package by their names in the config, sorted by name."""
    package = importlib.import_module(__package__)
    classes = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{__package__}.{info.name}")
        for cls in vars(module).values():
            if _is_objective(cls) and cls.__module__ == module.__name__:
                classes[_snake_case(cls.__name__)] = cls
    return dict(sorted(classes.items()))


def sections() -> dict[str, dict[str, Any]]:
    """Returns `config.objectives`: every objective's fields and defaults, with weight 0."""
    return {name: {**config_fields(cls), "weight": 0.0} for name, cls in objectives().items()}


def section(path: str, **values: Any) -> dict[str, Any]:
    """Returns the config section of an objective outside this package.

    A recipe adds it under a name of its choice, and every field can then be set by a flag::

        config.objectives.mine = registry.section("my_package.my_module:MyObjective", weight=1.0)

    Args:
      path: "module:Class", a subclass of `Objective` that Python can import.
      values: fields that differ from their defaults.

    Raises:
      UserError: if the class cannot be imported or is not an `Objective`, or a field is unknown.
    """
    setting = f"The objective {path!r}"
    fields = config_fields(_load(setting, path))
    _check_fields(setting, values, fields)
    return {CLASS: path, **fields, **values}


def build(name: str, values: Mapping[str, Any]) -> Objective | None:
    """Creates an objective from its config section; None if its weight is 0.

    Args:
      name: of the section in `config.objectives`.
      values: the section's fields. `CLASS` names a class outside this package.

    Raises:
      UserError: if the class or a field is unknown, or the section has no weight.
    """
    setting = f"config.objectives.{name}"
    values = dict(values)
    path = values.pop(CLASS, "")
    if "weight" not in values:
        raise errors.UserError(f"{setting} has no weight. Set {setting}.weight.")
    if not values["weight"]:
        return None
    classes = objectives()
    if path:
        cls = _load(f"{setting}.{CLASS}", path)
    elif name in classes:
        cls = classes[name]
    else:
        raise errors.UserError(
            f"{errors.unknown('The objective of config.objectives', name, classes)} For a class of "
            f"your own, set {setting}.{CLASS}='module:Class'."
        )
    _check_fields(f"The field of {setting}", values, config_fields(cls))
    return cls(**values)


def _load(setting: str, path: str) -> type[Objective]:
    """Imports the objective "module:Class".

    Args:
      setting: the setting with this path, for messages.
      path: "module:Class".

    Raises:
      UserError: see `section`.
    """
    module_name, _, class_name = str(path).partition(":")
    if not module_name or not class_name:
        raise errors.UserError(
            f"{setting}={errors.shown(path)} must have the form 'module:Class', for example "
            "'my_package.my_module:MyObjective'."
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything
        raise errors.UserError(
            f"{setting}={errors.shown(path)}: the module cannot be imported "
            f"({type(error).__name__}: {error}). Install its package, or add its folder to "
            "PYTHONPATH."
        ) from error
    cls = getattr(module, class_name, None)
    if cls is None:
        names = [name for name, value in vars(module).items() if _is_objective(value)]
        raise errors.unknown(f"{setting}: the class of {module_name}", class_name, names)
    if not _is_objective(cls):
        raise errors.UserError(
            f"{setting}={errors.shown(path)} must be a frozen dataclass that derives from "
            "disco_jax.methods.base.Objective."
        )
    without = [n for n, value in config_fields(cls).items() if value is dataclasses.MISSING]
    if without or "weight" not in config_fields(cls):
        raise errors.UserError(
            f"{setting}={errors.shown(path)} must have a field `weight`, and a default for every "
            f"field{': ' + ', '.join(without) if without else ''}."
        )
    return cls


def _check_fields(setting: str, values: Mapping[str, Any], allowed: Mapping[str, Any]) -> None:
    """Raises UserError if `values` has a field that is not allowed."""
    for field in values:
        if field not in allowed:
            raise errors.unknown(setting, field, allowed)


def _is_objective(cls: Any) -> bool:
    """Returns whether a value is a frozen dataclass derived from `Objective`."""
    if not isinstance(cls, type) or Objective not in cls.__mro__ or cls is Objective:
        return False
    return dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
