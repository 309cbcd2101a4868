"""Families of backbones whose checkpoints are read and written: one module per family."""

import importlib
import pkgutil

from disco_jax.convert.family import Family


def _families() -> tuple[Family, ...]:
    """Returns the `FAMILY` of every module of this package, in the order of their priorities."""
    names = [f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(name) for name in names]
    families = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return tuple(sorted(families, key=lambda family: family.priority))


FAMILIES = _families()
# Searched in order: the first layout whose signature is present is used.
LAYOUTS = tuple(layout for family in FAMILIES for layout in family.layouts)
