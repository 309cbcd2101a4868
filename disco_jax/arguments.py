"""Argument parser of the tasks that take a file instead of a config."""

import argparse
from collections.abc import Sequence

from disco_jax import errors


class Parser(argparse.ArgumentParser):
    """`ArgumentParser` that raises `UserError` and suggests the most similar option."""

    def __init__(self, task: str, description: str):
        super().__init__(
            prog=f"disco-jax {task}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def add_network(self) -> None:
        """Adds the arguments that select a network and its output."""
        self.add_argument("checkpoint", help="directory of a run or an import, or a PyTorch file")
        self.add_argument("--network", default="student", help="student or momentum")
        self.add_argument("--size", type=int, default=0, help="image size in px; 0: the run's")
        self.add_argument("--with-head", action="store_true", help="keep the projection head")

    def error(self, message: str):
        raise errors.UserError(f"{message}.\n{self.format_usage().rstrip()}")

    def read(self, argv: Sequence[str]) -> argparse.Namespace | None:
        """Parses `argv`; returns None if help was printed.

        Raises:
          UserError: an argument is unknown or invalid.
        """
        if {"-h", "--help"} & set(argv):
            self.print_help()
            return None
        values, rest = self.parse_known_args(argv)
        if rest:
            options = [word for action in self._actions for word in action.option_strings]
            near = errors.did_you_mean(rest[0].partition("=")[0], options)
            self.error(f"unrecognized argument {rest[0]!r}.{near}".rstrip("."))
        return values
