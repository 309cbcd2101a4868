"""Conversion of nested dicts to flat dicts with dotted keys."""

from collections.abc import Mapping
from typing import Any


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens a nested dict or ConfigDict: {"a": {"b": 1}} becomes {"a.b": 1}."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, Mapping) or hasattr(value, "items")
        out |= flatten(value, name + ".") if nested else {name: value}
    return out
