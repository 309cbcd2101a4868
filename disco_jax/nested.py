"""Nested settings as one level of dotted names."""

from collections.abc import Mapping
from typing import Any


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; for dicts and ConfigDicts."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, Mapping) or hasattr(value, "items")
        out |= flatten(value, name + ".") if nested else {name: value}
    return out
