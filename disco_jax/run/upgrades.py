"""Upgrades of configs written by earlier versions of this package.

New fields get the value that preserves the earlier behaviour; removed fields are dropped with a log
line. Runs can therefore be resumed, evaluated and exported after an upgrade.
"""

import logging
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

_LOG = logging.getLogger(__name__)

# Fields added after version 0.1.0 -> the value that preserves the earlier behaviour (with lists
# instead of tuples, as in JSON).
ADDED: dict[str, Any] = {
    "data.splits": "",
    "data.labels": "",
    "data.range": "full",
    "data.max_pixels": 178_956_970,
    "data.max_unreadable_percent": 1.0,
    "evaluation.splits": "",
    "evaluation.labels": "",
    "evaluation.range": "",
    "student.layers": 0,
    "student.weights": "",
    "student.start": "backbone",
    "student.network": "student",
    "teacher.layers": 0,
}


def completed(old: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flat config of an earlier start, upgraded to the fields of this version.

    Logs the fields that were added or dropped.

    Args:
      old: field -> value, as written by the earlier start.
      current: field -> value of this version's config.
    """
    values = {**ADDED, **_new_objectives(old, current)}
    added = {name: values[name] for name in current if name not in old and name in values}
    removed = [name for name in old if name not in current]
    if added:
        settings = ", ".join(f"config.{name}={value!r}" for name, value in added.items())
        _LOG.info("Settings added since this run began keep its behaviour: %s.", settings)
    if removed:
        settings = ", ".join(f"config.{name}={old[name]!r}" for name in removed)
        _LOG.warning("Settings of this run that no longer exist were dropped: %s.", settings)
    return {name: value for name, value in old.items() if name in current} | added


def _new_objectives(old: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of objectives that `old` has no section for, with weight 0."""
    sections = {tuple(name.split(".")[:2]) for name in old}
    new = {}
    for name, value in current.items():
        group, *rest = name.split(".")
        if group == "objectives" and rest and (group, rest[0]) not in sections:
            new[name] = 0.0 if rest[1:] == ["weight"] else value
    return new


def complete(config: ConfigDict) -> ConfigDict:
    """Adds the fields of later versions to a config and returns it.

    Args:
      config: changed in place. If it lacks a whole group of fields, it belongs to another command
        and the group is not added.
    """
    for name, value in ADDED.items():
        *groups, field = name.split(".")
        place: Any = config
        for group in groups:
            place = place.get(group) if isinstance(place, ConfigDict) else None
        if isinstance(place, ConfigDict) and field not in place:
            with place.unlocked():
                place[field] = value
    return config
