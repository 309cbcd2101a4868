"""Errors that answer a person, the exit code of each, and what their messages share."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Result = TypeVar("Result")

# Characters of a message that a given value, or the allowed ones, may take.
VALUE_LENGTH = 100
NAMES_LENGTH = 300


class UserError(ValueError):
    """A setting, path or input that cannot work; the message says what would. Exit code 2."""

    exit_code = 2


class NumericError(RuntimeError):
    """A loss or a parameter stopped being finite. Exit code 3."""

    exit_code = 3


class StorageError(RuntimeError):
    """The storage did not let something be read; starting again may help. Exit code 1."""

    exit_code = 1


class Preempted(RuntimeError):
    """The run was asked to stop and saved its state first. Exit code 75, "try again later"."""

    exit_code = 75


class Interrupted(Preempted):
    """The same after Ctrl-C. Exit code 130, as a shell gives it: 128 + SIGINT."""

    exit_code = 130


class Terminated(BaseException):
    """SIGTERM or SIGHUP came where there is nothing to save. Exit code 75.

    No `Exception`, so that what goes on after a failure does not go on after this.
    """


class Problems:
    """Collects what is wrong with a command, so that all of it is said at once."""

    def __init__(self) -> None:
        self._messages: list[str] = []
        self._fields: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._messages)

    def add(self, message: str, field: str = "") -> None:
        """Notes a mistake once.

        Args:
          message: for the user.
          field: of the config that is wrong, e.g. "student.width"; "": none, or several.
        """
        if field:
            self._fields.add(field)
        if message not in self._messages:
            self._messages.append(message)

    def attempt(
        self, check: Callable[..., Result], *args: Any, reads: Iterable[str] = ()
    ) -> Result | None:
        """Calls `check(*args)` and notes the `UserError` that it raises.

        Args:
          check: a function.
          args: its arguments.
          reads: fields and groups of the config that it reads; where one of them is wrong already
            it is not called, as its answer would mean nothing.

        Returns:
          What `check` returned; None if it was not called or raised.
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
        """Raises one `UserError` with everything that was noted, if anything was."""
        if self._messages:
            raise UserError("\n  ".join(self._messages))


def shown(value: Any) -> str:
    """A value as a message shows it: what is long is cut."""
    text = repr(value)
    return text if len(text) <= VALUE_LENGTH else f"{text[:VALUE_LENGTH]}... ({len(text)} long)"


def nearest(given: str, allowed: Iterable[str]) -> str:
    """The allowed value closest to `given`, or "" when none is close."""
    given = str(given)[:VALUE_LENGTH]  # difflib takes seconds for what is long
    close = difflib.get_close_matches(given, [str(a) for a in allowed], n=1, cutoff=0.5)
    return close[0] if close else ""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """A sentence naming the allowed value closest to `given`, or "" when none is close."""
    near = nearest(given, allowed)
    return f" Did you mean {near!r}?" if near else ""


def unknown(
    setting: str, given: Any, allowed: Iterable[str], see: str = "disco-jax list"
) -> UserError:
    """The error for a name that is not in a table.

    Args:
      setting: where the name was given, e.g. "config.student.backbone".
      given: the name.
      allowed: every name that would do.
      see: the command that shows them, for tables that are too long for a message.
    """
    names = sorted(str(a) for a in allowed)
    return UserError(
        f"{setting}={shown(given)} is not known.{did_you_mean(given, names)} "
        f"Allowed: {listed(names, see)}."
    )


def listed(names: Iterable[str], see: str = "disco-jax list") -> str:
    """Names as a message lists them; of too many only some, and the command that shows all."""
    names = [name or "''" for name in names]
    text = ", ".join(names)
    if len(text) <= NAMES_LENGTH:
        return text
    some = text[: text.rindex(", ", 0, NAMES_LENGTH // 3)]
    return f"{some} and others ({len(names)} in all, see `{see}`)"
