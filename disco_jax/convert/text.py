"""Text that stands in a file, as messages show it."""

from collections.abc import Iterable
from typing import Any

_LONGEST = 120  # characters of one name


def shown(value: Any) -> str:
    """Text of a file, or of an error about it: printable ASCII, at most 120 characters.

    What a file names can hold control characters, which a terminal would obey.
    """
    return ascii(str(value))[1:-1][:_LONGEST]


def listed(names: Iterable[Any], most: int = 5) -> str:
    """The first of a file's names, and how many there are besides."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name) for name in names[:most]) + more
