"""Backbones: one family per module, which ends with its class `FAMILY` and its `VARIANTS`."""

import importlib
import pkgutil
from typing import Any

from disco_jax import errors, plugins
from disco_jax.models.backbones.backbone import Backbone


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


def find(name: str, setting: str = "The backbone") -> tuple[type[Backbone], dict[str, Any]]:
    """Returns the class of a backbone and the fields of the variant.

    Args:
      name: a name in `BACKBONES`; or "module:Class", a subclass of `Backbone` outside this package
        whose fields have defaults.
      setting: the setting with this name, for messages.

    Raises:
      UserError: there is no backbone of this name.
    """
    if ":" in name:
        requirement = "a subclass of disco_jax.models.backbones.backbone.Backbone"
        return plugins.load_class(setting, name, _is_backbone, requirement), {}
    if name not in BACKBONES:
        raise errors.unknown(setting, name, BACKBONES)
    return BACKBONES[name]


def _is_backbone(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, Backbone) and cls is not Backbone
