"""Typed settings: frozen dataclasses whose fields are sections of a config.

A section is generated from its dataclass (`section`), so that a field is declared once, with its
default and its meaning. `parse` converts a section back to the dataclass.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from disco_jax import errors

T = TypeVar("T")

_OPTIONAL = "optional"


def optional(default: Any) -> Any:
    """Declares a field that generated sections omit; other sections may have it."""
    return dataclasses.field(default=default, metadata={_OPTIONAL: True})


def section(cls: type, **values: Any) -> dict[str, Any]:
    """Returns the section of a config that a dataclass describes.

    Args:
      cls: a dataclass. A field whose type is a dataclass becomes a nested section.
      values: fields that differ from their defaults, and those that have none.
    """
    fields = [field for field in dataclasses.fields(cls) if not field.metadata.get(_OPTIONAL)]
    assert values.keys() <= {field.name for field in fields}, (cls, values)
    nested = sections(cls)
    return {
        field.name: values[field.name]
        if field.name in values
        else section(nested[field.name])
        if field.name in nested
        else _default(field)
        for field in fields
    }


def sections(cls: type) -> dict[str, type]:
    """Returns the fields of a dataclass whose types are dataclasses: name -> type."""
    kinds = _types(cls).items()
    return {name: cast(type, kind) for name, kind in kinds if dataclasses.is_dataclass(kind)}


def parse(
    cls: type[T],
    values: Any,
    setting: str = "config",
    *,
    defaults: bool = False,
    stored: bool = False,
) -> T:
    """Converts a section of a config to a dataclass, recursively, with tuples for sequences.

    The values themselves are checked by `fields.check`, not here.

    Args:
      cls: a dataclass.
      values: the section, a mapping or ConfigDict.
      setting: name of the section, for messages.
      defaults: missing fields take their defaults, as in a section of an evaluation.
      stored: the section is from a config.json, perhaps of an earlier version: missing fields take
        their defaults, and fields that this version does not have are ignored.

    Raises:
      UserError: fields are unknown or missing, with all of them; or the section is no mapping.
    """
    if not hasattr(values, "items"):
        raise errors.UserError(f"{setting}={errors.shown(values)} must be a section of fields.")
    problems = errors.Problems()
    kinds, parsed = _types(cast(type, cls)), {}
    convert = functools.partial(_convert, defaults=defaults, stored=stored)
    for name, value in values.items():
        if name in kinds:
            parsed[name] = problems.attempt(convert, kinds[name], value, f"{setting}.{name}")
        elif not stored:
            problems.add(str(errors.unknown(f"The field of {setting}", name, kinds)))
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in values:
            continue
        where, lenient = f"{setting}.{field.name}", defaults or stored
        if lenient and dataclasses.is_dataclass(kinds[field.name]):
            parsed[field.name] = problems.attempt(convert, kinds[field.name], {}, where)
        elif not (lenient or field.metadata.get(_OPTIONAL)) or not _has_default(field):
            problems.add(f"{where} is missing. Set it in the recipe.")
    problems.raise_any()
    return cls(**parsed)


def values(settings: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass: name -> value; nested dataclasses are not converted."""
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}


def notes(cls: type) -> dict[str, str]:
    """Returns field -> description, from the "Attributes" of a dataclass and of its bases."""
    out: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        name = ""
        for line in text.partition("Attributes:\n")[2].splitlines():
            if line.startswith("    ") and name:
                out[name] += f" {line.strip()}"
            elif line.startswith("  ") and ": " in line:
                name, _, description = line.strip().partition(": ")
                out[name] = description
            else:
                break
    return out


def _convert(kind: Any, value: Any, setting: str, *, defaults: bool, stored: bool) -> Any:
    """Converts one value to the type of its field."""
    if dataclasses.is_dataclass(kind):
        return parse(cast(type, kind), value, setting, defaults=defaults, stored=stored)
    return plain(value)


def plain(value: Any) -> Any:
    """Converts lists to tuples, and ConfigDicts to dicts, at all depths."""
    if isinstance(value, (list, tuple)):
        return tuple(map(plain, value))
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {name: plain(item) for name, item in value.items()}
    return value


@functools.cache
def _types(cls: type) -> dict[str, Any]:
    """Returns the fields of a dataclass and their types, in the order of declaration."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _default(field: dataclasses.Field) -> Any:
    """Returns the default of a field."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    assert field.default is not dataclasses.MISSING, f"{field.name} has no default"
    return field.default


def _has_default(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing
