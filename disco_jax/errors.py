"""Exceptions with exit codes, and helpers that format their messages."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Result = TypeVar("Result")

# Most characters of a message that show the rejected value, or the allowed names.
VALUE_LENGTH = 100
NAMES_LENGTH = 300


class UserError(ValueError):
    """An invalid setting, path or input; the message says what is allowed. Exit code 2."""

    exit_code = 2


class NumericError(RuntimeError):
    """A loss or parameter that is NaN or infinite. Exit code 3."""

    exit_code = 3


class StorageError(RuntimeError):
    """A failed read from storage; a restart may succeed. Exit code 1."""

    exit_code = 1


class Preempted(RuntimeError):
    """A stop by a signal, after the run saved its state. Exit code 75 (EX_TEMPFAIL)."""

    exit_code = 75


class Interrupted(Preempted):
    """A stop by Ctrl-C, after the run saved its state. Exit code 130, the shells' 128 + SIGINT."""

    exit_code = 130


class Terminated(BaseException):
    """SIGTERM or SIGHUP while there is nothing to save. Exit code 75.

    Derives from `BaseException`, so that code that continues after an `Exception` stops here.
    """


class Problems:
    """Collects all mistakes of a command line, to report them in one message."""

    def __init__(self) -> None:
        self._messages: list[str] = []
        self._fields: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._messages)

    def add(self, message: str, field: str = "") -> None:
        """Records a mistake, unless the same message was recorded before.

        Args:
          message: text for the user.
          field: the wrong config field, e.g. "student.width"; "" for none or several.
        """
        if field:
            self._fields.add(field)
        if message not in self._messages:
            self._messages.append(message)

    def attempt(
        self, check: Callable[..., Result], *args: Any, reads: Iterable[str] = ()
    ) -> Result | None:
        """Calls `check(*args)` and records the `UserError` that it raises.

        Args:
          check: a function.
          args: its positional arguments.
          reads: config fields and groups that `check` reads. If one of them is already recorded
            as wrong, `check` is not called, since its outcome would be meaningless.

        Returns:
          The return value of `check`; None if it raised or was not called.
        """
        groups = tuple(reads)
        if any(f"{field}.".startswith(f"{group}.") for field in self._fields for group in groups):
            return None
        try:
            return check(*args)
        except UserError as error:
            self.add(str(error))
            return None

    def raise_any(self) -> None:
        """Raises one `UserError` with all recorded messages, if there are any."""
        if self._messages:
            raise UserError("\n  ".join(self._messages))


def shown(value: Any) -> str:
    """Returns `repr(value)`, truncated to `VALUE_LENGTH` characters."""
    text = repr(value)
    return text if len(text) <= VALUE_LENGTH else f"{text[:VALUE_LENGTH]}... ({len(text)} long)"


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Returns the allowed value most similar to `name`, or "" if none is similar."""
    name = str(name)[:VALUE_LENGTH]  # difflib takes seconds for long strings
    close = difflib.get_close_matches(name, [str(a) for a in allowed], n=1, cutoff=0.5)
    return close[0] if close else ""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Returns a sentence with the allowed value most similar to `name`, or "" if none is."""
    near = nearest(name, allowed)
    return f" Did you mean {near!r}?" if near else ""


def unknown(
    setting: str, name: Any, allowed: Iterable[str], see: str = "disco-jax list"
) -> UserError:
    """Returns the error for a name that is not in a table.

    Args:
      setting: the flag or field that has the name, e.g. "config.student.backbone".
      name: the unknown name.
      allowed: all names of the table.
      see: a command that lists them, for tables too long for a message.
    """
    names = sorted(str(a) for a in allowed)
    return UserError(
        f"{setting}={shown(name)} is not known.{did_you_mean(name, names)} "
        f"Allowed: {listed(names, see)}."
    )


def listed(names: Iterable[str], see: str = "disco-jax list") -> str:
    """Joins names with commas; names beyond `NAMES_LENGTH` characters become "see `COMMAND`"."""
    names = [name or "''" for name in names]
    text = ", ".join(names)
    if len(text) <= NAMES_LENGTH:
        return text
    some = text[: text.rindex(", ", 0, NAMES_LENGTH // 3)]
    return f"{some} and others ({len(names)} in all, see `{see}`)"
