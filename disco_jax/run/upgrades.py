"""Upgrades of configs written by earlier versions of this package.

New fields get the value that preserves the earlier behaviour; renamed fields keep their value;
removed fields are dropped with a log line. Runs can therefore be resumed, evaluated and exported
after an upgrade.
"""

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from disco_jax.nested import flatten

_LOG = logging.getLogger(__name__)

# Fields added after version 0.1.0 -> the value that preserves the earlier behaviour (with lists
# instead of tuples, as in JSON).
ADDED: dict[str, Any] = {
    "data.splits": "",
    "data.labels": "",
    "data.range": "full",
    "data.max_pixels": 178_956_970,
    "data.max_unreadable_percent": 1.0,
    "data.reader": "threads",
    "data.eval_interpolation": "",
    "evaluation.data.eval_interpolation": "",
    "evaluation.labelled.listed": 0,
    "evaluation.held_out.per_class": 0,
    "evaluation.held_out.seed": 0,
    "evaluation.grid.folds": 0,
    "evaluation.optimizer.weight_decay_end": -1.0,
    "evaluation.optimizer.no_decay": [],
    "evaluation.optimizer.trust": 1e-3,
    "evaluation.optimizer.no_trust": [],
    "evaluation.optimizer.clip": 0.0,
    "evaluation.optimizer.frozen_until": [],
    "evaluation.optimizer.frozen_steps": 0,
    "evaluation.optimizer.frozen_epochs": 0,
    "evaluation.optimizer.frozen": [],
    "evaluation.optimizer.unit_norm": [],
    "evaluation.optimizer.nesterov": False,
    "evaluation.splits": "",
    "evaluation.labels": "",
    "evaluation.range": "",
    "objectives.bags.cutmix_group": 0,
    "student.layers": 0,
    "student.weights": "",
    "student.predictor": 0,
    "student.start": "backbone",
    "student.network": "student",
    "teacher.layers": 0,
    "teacher.predictor": 0,
}
# Fields and groups of fields renamed after version 0.1.0: earlier name -> name in this version.
# A name that is both old and new comes first as the old one.
RENAMED = {
    "learning_rate.per_256": "learning_rate.base_lr",
    "optimizer.frozen": "optimizer.frozen_until",
    "optimizer.fixed": "optimizer.frozen",
    "plane": "information_plane",
}


def renamed(names: Collection[str]) -> dict[str, str]:
    """Returns earlier name -> name in this version for the fields that were renamed.

    `optimizer.frozen` has changed its meaning; it is renamed only if `names` lacks its new name.
    All other earlier names are always renamed: a recipe that sets one has the new name as well,
    with its default.

    Args:
      names: all fields of a config, or a field that no config of this version has.
    """
    out: dict[str, str] = {}
    for old, new in RENAMED.items():
        pattern = re.compile(rf"(^|\.){re.escape(old)}(?=\.|$)")
        for name in names:
            current = pattern.sub(rf"\g<1>{new}", name, count=1)
            if current != name and (current not in names or old not in RENAMED.values()):
                out[name] = current
    return out


def current_name(field: str, fields: Collection[str]) -> str:
    """Returns the name in this version of a renamed field, if `fields` has it, else "".

    Logs the renaming.
    """
    current = renamed([field]).get(field, "")
    if current not in fields:
        return ""
    _LOG.warning("config.%s is now config.%s.", field, current)
    return current


def completed(old: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flat config of an earlier start, upgraded to the fields of this version.

    Logs the fields that were added, renamed or dropped.

    Args:
      old: field -> value, as written by the earlier start.
      current: field -> value of this version's config.
    """
    names = _log_renamed(renamed(old))
    old = {names.get(name, name): value for name, value in old.items()}
    values = {**ADDED, **_unused_objectives(old, current)}
    added = {name: values[name] for name in current if name not in old and name in values}
    removed = [name for name in old if name not in current]
    if added:
        settings = ", ".join(f"config.{name}={value!r}" for name, value in added.items())
        _LOG.info("Settings added since this run began keep its behaviour: %s.", settings)
    if removed:
        settings = ", ".join(f"config.{name}={old[name]!r}" for name in removed)
        _LOG.warning("Settings of this run that no longer exist were dropped: %s.", settings)
    return {name: value for name, value in old.items() if name in current} | added


def _unused_objectives(old: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of objectives that `old` lacks or weights with 0, without their effect.

    They have the values of `current`; an objective that `old` has no section for gets weight 0.
    """
    weights = {name: value for name, value in old.items() if name.endswith(".weight")}
    new = {}
    for name, value in current.items():
        group, *rest = name.split(".")
        if group == "objectives" and rest and not weights.get(f"{group}.{rest[0]}.weight"):
            new[name] = 0.0 if rest[1:] == ["weight"] else value
    return new


def complete(config: ConfigDict) -> ConfigDict:
    """Adds the fields of later versions to a config, renames earlier ones, and returns it.

    Args:
      config: changed in place. If it lacks a whole group of fields, it belongs to another command
        and the group is not added.
    """
    rename(config)
    for name, value in ADDED.items():
        *groups, field = name.split(".")
        place: Any = config
        for group in groups:
            place = place.get(group) if isinstance(place, ConfigDict) else None
        if isinstance(place, ConfigDict) and field not in place:
            with place.unlocked():
                place[field] = value
    return config


def _log_renamed(names: Mapping[str, str]) -> Mapping[str, str]:
    """Logs a line with the renamed fields, if there are any; returns `names`."""
    if names:
        pairs = ", ".join(f"config.{old} is now config.{new}" for old, new in names.items())
        _LOG.info("Settings were renamed: %s.", pairs)
    return names


def rename(config: ConfigDict) -> None:
    """Moves the values of renamed fields to their new names, in place, and logs the names."""
    values = flatten(config)
    names = _log_renamed(renamed(values))
    with config.unlocked():
        for old in names:
            del _group(config, old)[old.rpartition(".")[2]]
        for old, new in names.items():
            _group(config, new)[new.rpartition(".")[2]] = values[old]
        for group in RENAMED.keys() - names.keys():
            if isinstance(config.get(group), ConfigDict) and not config[group]:
                del config[group]


def _group(config: ConfigDict, name: str) -> Any:
    """Returns the section that contains a field; creates it if there is none."""
    for group in name.split(".")[:-1]:
        if group not in config:
            config[group] = ConfigDict()
        config = config[group]
    return config
