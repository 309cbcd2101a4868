"""Checks of the fields that several objectives have; each message names the setting to change."""

from typing import Any

from disco_jax import errors

# Fields that must be positive, because losses divide by them.
POSITIVE = (
    "temperature",
    "student_temperature",
    "teacher_temperature",
    "target_temperature",
    "momentum_temperature",
    "warmup_temperature",
    "epsilon",
    "iterations",
)
QUEUE_INITS = ("random", "teacher")


def check_positive(setting: str, value: float) -> None:
    """Raises UserError unless a number is above 0."""
    if value <= 0:
        raise errors.UserError(f"{setting} must be above 0.")


def check_share(setting: str, value: float) -> None:
    """Raises UserError if the share of the pairs of global views is above 1."""
    if value > 1:
        raise errors.UserError(
            f"{setting}={value} must be between 0 and 1, or -1 to weigh all pairs of views equally."
        )


def check_choice(setting: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raises UserError unless a value is allowed."""
    if value not in allowed:
        raise errors.unknown(setting, value, allowed)


def check_queue_size(setting: str, size: int, batch_size: int) -> None:
    """Raises UserError unless a queue holds one or more whole batches.

    Args:
      setting: path of the queue's size in the config.
      size: number of its entries.
      batch_size: images of all devices in a step, which are pushed together.
    """
    if size < 1 or size % batch_size:
        below = size // batch_size * batch_size
        nearest = [str(n) for n in (below, below + batch_size) if n > 0]
        raise errors.UserError(
            f"{setting}={size} is not a multiple of the global batch "
            f"config.batch_size={batch_size}; the nearest that are: {', '.join(nearest)}."
        )
