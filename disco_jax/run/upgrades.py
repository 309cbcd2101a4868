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
      current: field -> value of this version's config; only the names are used.
    """
    added = {name: ADDED[name] for name in current if name not in old and name in ADDED}
    removed = [name for name in old if name not in current]
    if added:
        settings = ", ".join(f"config.{name}={value!r}" for name, value in added.items())
        _LOG.info("Settings added since this run began keep its behaviour: %s.", settings)
    if removed:
        settings = ", ".join(f"config.{name}={old[name]!r}" for name in removed)
        _LOG.warning("Settings of this run that no longer exist were dropped: %s.", settings)
    return {name: value for name, value in old.items() if name in current} | added


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
