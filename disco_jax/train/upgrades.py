"""Configs of runs that began with an earlier version of this package.

A field that came later is given the value that computes what runs did before it; one that went is
dropped with a line. So a run goes on after an upgrade, and is evaluated and exported like others.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from disco_jax.methods import registry

_LOG = logging.getLogger(__name__)

# Fields that came after version 0.1.0 -> the value that changes nothing
# (lists for tuples, as JSON has them).
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


def completed(old: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flat config of an earlier start with the fields of today, and tells of both.

    Args:
      old: field -> value, as the earlier start wrote it.
      known: field -> value of today's config; only the names count.
    """
    values = {**ADDED, **_new_objectives(old)}
    added = {name: values[name] for name in known if name not in old and name in values}
    gone = [name for name in old if name not in known]
    if added:
        told = ", ".join(f"config.{name}={value!r}" for name, value in added.items())
        _LOG.info("Settings that are new since this run began, taken as before: %s.", told)
    if gone:
        told = ", ".join(f"config.{name}={old[name]!r}" for name in gone)
        _LOG.warning("Settings of this run that there are no more, dropped: %s.", told)
    return {name: value for name, value in old.items() if name in known} | added


def _new_objectives(old: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields, with weight 0, of objectives that `old` has no section for."""
    sections = json.loads(json.dumps(registry.sections()))
    return {
        f"objectives.{name}.{field}": value
        for name, section in sections.items()
        if not any(key.startswith(f"objectives.{name}.") for key in old)
        for field, value in section.items()
    }


def complete(config: ConfigDict) -> ConfigDict:
    """Gives a config of an earlier version the fields that came later; returns it.

    Args:
      config: changed in place. Where it lacks a whole group of fields it is none of a run's, and
        that group is left out.
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
