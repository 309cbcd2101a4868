"""Errors that answer a person, the exit code of each, and the nearest-match helper they share."""

import difflib
from collections.abc import Iterable


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


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """A sentence naming the allowed value closest to `given`, or "" when none is close."""
    close = difflib.get_close_matches(str(given), [str(a) for a in allowed], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown(setting: str, given: str, allowed: Iterable[str]) -> UserError:
    """The error for a name that is not in a table.

    Args:
      setting: where the name was given, e.g. "config.student.backbone".
      given: the name.
      allowed: every name that would do.
    """
    allowed = sorted(str(a) for a in allowed)
    return UserError(
        f"{setting}={given!r} is not known.{did_you_mean(given, allowed)} Allowed: "
        + ", ".join(allowed)
        + "."
    )
