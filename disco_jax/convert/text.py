"""Formats text from files for messages."""

from collections.abc import Iterable
from typing import Any

_MAX_LENGTH = 120  # characters of one name


def shown(value: Any) -> str:
    """Returns text of a file, or of an error about it, as printable ASCII, cut to 120 characters.

    Names in a file can contain control characters, which a terminal would obey.
    """
    return ascii(str(value))[1:-1][:_MAX_LENGTH]


def listed(names: Iterable[Any], most: int = 5) -> str:
    """Returns the first `most` names of a file, separated by commas, and counts the others."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name) for name in names[:most]) + more
