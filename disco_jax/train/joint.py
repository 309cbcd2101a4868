"""Runs that take their steps together: each keeps its own metrics and checkpoints.

The loop sees one state, one logger and one set of checkpoints; here they are told apart by name.
What belongs to a single run is called "NAME/..." in a summary, what belongs to all has no name.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from disco_jax.errors import NumericError
from disco_jax.train import metrics
from disco_jax.train.checkpoint import Checkpoints
from disco_jax.train.metrics import Logger
from disco_jax.train.state import TrainState

_OF = "/"


class Diverged(NumericError):
    """Some of the runs are not finite.

    Attributes:
      names: of those runs.
    """

    def __init__(self, problems: Mapping[str, str]):
        super().__init__("\n  ".join(f"{name}: {text}" for name, text in problems.items()))
        self.names = tuple(problems)


def summarise(
    window: Sequence[Mapping[str, Mapping[str, jax.Array]]], step: int
) -> dict[str, float]:
    """`metrics.summarise` of each run.

    Args:
      window: name -> metrics, of consecutive steps.
      step: of the newest of them.

    Returns:
      "NAME/METRIC" -> value.

    Raises:
      Diverged: a value of some run is not finite.
    """
    found: dict[str, float] = {}
    problems: dict[str, str] = {}
    for name in window[-1]:
        try:
            own = metrics.summarise([one[name] for one in window], step)
        except NumericError as error:
            problems[name] = str(error)
        else:
            found |= named(name, own)
    if problems:
        raise Diverged(problems)
    return found


def check_states(step: int, states: Mapping[str, TrainState]) -> None:
    """`metrics.check_state` of each run.

    Raises:
      Diverged: the state of some run is not finite.
    """
    problems: dict[str, str] = {}
    for name, state in states.items():
        try:
            metrics.check_state(step, state)
        except NumericError as error:
            problems[name] = str(error)
    if problems:
        raise Diverged(problems)


def named(name: str, scalars: Mapping[str, float]) -> dict[str, float]:
    """Scalars of one run, as they stand in a summary of all."""
    return {name + _OF + key: value for key, value in scalars.items()}


def part_of(name: str, names: Sequence[str], summary: Mapping[str, float]) -> dict[str, float]:
    """What a summary says of one run and of all of them.

    Args:
      name: of the run.
      names: of all runs.
      summary: see `summarise`.
    """
    others = tuple(other + _OF for other in names if other != name)
    return {
        key.removeprefix(name + _OF): value
        for key, value in summary.items()
        if not key.startswith(others)
    }


class JointLogger:
    """A `Logger` for each run."""

    def __init__(self, loggers: Mapping[str, Logger]):
        self._loggers = dict(loggers)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Logger.write`; each run gets its own scalars and those of all."""
        for name, logger in self._loggers.items():
            logger.write(step, part_of(name, tuple(self._loggers), scalars))

    def close(self) -> None:
        """Closes what is open."""
        for logger in self._loggers.values():
            logger.close()


class JointCheckpoints:
    """The `Checkpoints` of each run, saved at the same steps."""

    def __init__(self, checkpoints: Mapping[str, Checkpoints]):
        self._checkpoints = dict(checkpoints)

    def save(
        self,
        step: int,
        states: Mapping[str, TrainState],
        position: Sequence[Sequence[int]],
        summary: Mapping[str, float],
    ) -> None:
        """See `Checkpoints.save`; each run's is one that it could go on from alone."""
        for name, checkpoints in self._checkpoints.items():
            own = part_of(name, tuple(self._checkpoints), summary)
            checkpoints.save(step, states[name], position, own)

    def restore(
        self, like: Mapping[str, TrainState]
    ) -> tuple[dict[str, TrainState], dict[str, Any]] | None:
        """The newest good checkpoints of one step, or None if there is none that all runs have.

        A kill between two saves leaves some runs a checkpoint further than others; these take
        those steps again, to the same end.

        Args:
          like: name -> a state of the same shapes and dtypes.

        Returns:
          name -> state, and what is noted of all: {"step", "position", ...}.

        Raises:
          UserError: see `Checkpoints.restore`.
        """
        steps = set.intersection(*(set(c.steps()) for c in self._checkpoints.values()))
        for step in sorted(steps, reverse=True):
            found = {}
            for name, checkpoints in self._checkpoints.items():
                restored = checkpoints.restore(like[name], newest=step)
                if restored is None or restored[1]["step"] != step:
                    break  # it was damaged
                found[name] = restored
            if len(found) == len(self._checkpoints):
                meta = next(iter(found.values()))[1]
                return {name: state for name, (state, _) in found.items()}, meta
        return None

    def check_none_lost(self) -> None:
        """See `Checkpoints.check_none_lost`."""
        for checkpoints in self._checkpoints.values():
            checkpoints.check_none_lost()

    def wait(self) -> None:
        """Returns when everything asked for is on the disk."""
        for checkpoints in self._checkpoints.values():
            checkpoints.wait()

    def close(self) -> None:
        """`wait`, then release the background threads."""
        for checkpoints in self._checkpoints.values():
            checkpoints.close()


def watching(
    watches: Mapping[str, Callable[[int, Mapping[str, float]], None]],
) -> Callable[[int, Mapping[str, float]], None]:
    """One watch of a summary for all runs: name -> what is called with a run's own."""

    def watch(step: int, summary: Mapping[str, float]) -> None:
        for name, one in watches.items():
            one(step, part_of(name, tuple(watches), summary))

    return watch
