"""Joint training of several runs, each with its own metrics and checkpoints.

The loop handles one state, one logger and one set of checkpoints; this module splits them by run.
In a summary, metrics of a single run are named "NAME/..."; metrics of all runs have no prefix.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from disco_jax.errors import NumericError
from disco_jax.run.checkpoint import Checkpoints
from disco_jax.run.metrics import Logger
from disco_jax.train import summary
from disco_jax.train.state import TrainState

_SEPARATOR = "/"


class Diverged(NumericError):
    """Some of the runs have values that are not finite.

    Attributes:
      names: names of those runs.
    """

    def __init__(self, problems: Mapping[str, str]):
        super().__init__("\n  ".join(f"{name}: {text}" for name, text in problems.items()))
        self.names = tuple(problems)


def summarise(
    window: Sequence[Mapping[str, Mapping[str, jax.Array]]], step: int
) -> dict[str, float]:
    """Summarises the metrics of each run with `summary.summarise`.

    Args:
      window: {name: metrics} of consecutive steps.
      step: number of the last of these steps.

    Returns:
      "NAME/METRIC" -> value.

    Raises:
      Diverged: a value of some run is not finite.
    """
    metrics: dict[str, float] = {}
    problems: dict[str, str] = {}
    for name in window[-1]:
        try:
            own = summary.summarise([one[name] for one in window], step)
        except NumericError as error:
            problems[name] = str(error)
        else:
            metrics |= named(name, own)
    if problems:
        raise Diverged(problems)
    return metrics


def check_states(step: int, states: Mapping[str, TrainState]) -> None:
    """Checks the state of each run with `summary.check_state`.

    Raises:
      Diverged: the state of some run is not finite.
    """
    problems: dict[str, str] = {}
    for name, state in states.items():
        try:
            summary.check_state(step, state)
        except NumericError as error:
            problems[name] = str(error)
    if problems:
        raise Diverged(problems)


def named(name: str, scalars: Mapping[str, float]) -> dict[str, float]:
    """Prefixes the scalars of one run with its name, as in a summary of all runs."""
    return {name + _SEPARATOR + key: value for key, value in scalars.items()}


def part_of(name: str, names: Sequence[str], summary: Mapping[str, float]) -> dict[str, float]:
    """Selects the scalars of one run, without its prefix, and those of all runs.

    Args:
      name: name of the run.
      names: names of all runs.
      summary: see `summarise`.
    """
    others = tuple(other + _SEPARATOR for other in names if other != name)
    return {
        key.removeprefix(name + _SEPARATOR): value
        for key, value in summary.items()
        if not key.startswith(others)
    }


class JointLogger:
    """A logger that splits summaries between the `Logger`s of several runs."""

    def __init__(self, loggers: Mapping[str, Logger]):
        self._loggers = dict(loggers)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes to each run its own scalars and those of all runs; see `Logger.write`."""
        for name, logger in self._loggers.items():
            logger.write(step, part_of(name, tuple(self._loggers), scalars))

    def close(self) -> None:
        """Closes the logger of each run."""
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
        """Saves the state of each run; see `Checkpoints.save`.

        A run can resume from its checkpoint without the other runs.
        """
        for name, checkpoints in self._checkpoints.items():
            own = part_of(name, tuple(self._checkpoints), summary)
            checkpoints.save(step, states[name], position, own)

    def restore(
        self, like: Mapping[str, TrainState]
    ) -> tuple[dict[str, TrainState], dict[str, Any]] | None:
        """Restores the newest step for which all runs have a valid checkpoint.

        If the process was killed between two saves, some runs have one checkpoint more than
        others. All runs then resume from the older step and repeat the same updates.

        Args:
          like: name -> a state of the same shapes and dtypes.

        Returns:
          {name: state} and the shared metadata {"step", "position", ...}; None if no step has a
          valid checkpoint of all runs.

        Raises:
          UserError: see `Checkpoints.restore`.
        """
        steps = set.intersection(*(set(c.steps()) for c in self._checkpoints.values()))
        for step in sorted(steps, reverse=True):
            restored = {}
            for name, checkpoints in self._checkpoints.items():
                checkpoint = checkpoints.restore(like[name], newest=step)
                if checkpoint is None or checkpoint[1]["step"] != step:
                    break  # the checkpoint of `step` is damaged
                restored[name] = checkpoint
            if len(restored) == len(self._checkpoints):
                meta = next(iter(restored.values()))[1]
                return {name: state for name, (state, _) in restored.items()}, meta
        return None

    def check_none_lost(self) -> None:
        """Calls `Checkpoints.check_none_lost` for each run."""
        for checkpoints in self._checkpoints.values():
            checkpoints.check_none_lost()

    def wait(self) -> None:
        """Waits until the checkpoints of all runs are on the disk."""
        for checkpoints in self._checkpoints.values():
            checkpoints.wait()

    def close(self) -> None:
        """Waits, then releases the background threads."""
        for checkpoints in self._checkpoints.values():
            checkpoints.close()


def watching(
    watches: Mapping[str, Callable[[int, Mapping[str, float]], None]],
) -> Callable[[int, Mapping[str, float]], None]:
    """Combines the watches of several runs into one that takes the joint summary.

    Args:
      watches: name -> function (step, summary of that run) -> None.
    """

    def watch(step: int, summary: Mapping[str, float]) -> None:
        for name, one in watches.items():
            one(step, part_of(name, tuple(watches), summary))

    return watch
