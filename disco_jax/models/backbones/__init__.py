"""Backbones: one family per module, which ends with its class `FAMILY` and its `VARIANTS`."""

import importlib
import pkgutil
from typing import Any

from disco_jax.models.backbones.base import Backbone


def _variants() -> dict[str, tuple[type[Backbone], dict[str, Any]]]:
    """Collects {name: (class, fields)} of all modules in this package that define variants."""
    modules = [
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
    ]
    return {
        name: (module.FAMILY, fields)
        for module in modules
        for name, fields in vars(module).get("VARIANTS", {}).items()
    }


BACKBONES = _variants()
