"""Schedules: functions of the step that return a scalar, traced inside the training step."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array

Schedule = Callable[[Array], Array]


def constant(value: float) -> Schedule:
    """Returns a schedule with the same value at every step."""
    return lambda step: jnp.full((), value, jnp.float32)


def per_epoch(schedule: Schedule, steps_per_epoch: int) -> Schedule:
    """Returns `schedule` held within each epoch at its first value, as the papers' code does."""
    return lambda step: schedule(step // steps_per_epoch * steps_per_epoch)


def cosine(peak: float, total_steps: int) -> Schedule:
    """Returns a cosine decay from `peak` at step 0 to 0 at `total_steps`.

    peak / 2 (1 + cos(pi step / total_steps)), computed as the squared sine of the remaining
    fraction, which stays accurate in float32 near the end.
    """

    def value(step: Array) -> Array:
        return peak * jnp.square(jnp.sin(jnp.pi / 2 * _fraction(total_steps - step, total_steps)))

    return value


def steps(peak: float, milestones: Sequence[int], factor: float) -> Schedule:
    """Returns a step decay: `peak` multiplied by `factor` at each milestone (a step number)."""
    return lambda step: (
        peak * jnp.prod(jnp.where(step >= jnp.asarray(milestones, jnp.int32), factor, 1.0))
    )


def warmup(schedule: Schedule, start: float, peak: float, warmup_steps: int) -> Schedule:
    """Returns a linear warm-up from `start` at step 0 to `peak`, followed by `schedule`.

    `schedule` is not shifted: as in SEED, the cosine spans the whole run and takes over at
    `warmup_steps`. SwAV and DINO start the cosine after the warm-up; see `cosine_after`.
    """

    def value(step: Array) -> Array:
        ramp = start + (peak - start) * _fraction(step, max(warmup_steps, 1))
        return jnp.where(step < warmup_steps, ramp, schedule(step))

    return value


def cosine_after(
    start: float, peak: float, end: float, warmup_steps: int, total_steps: int
) -> Schedule:
    """Returns a linear warm-up from `start` to `peak`, then half a cosine from `peak` to `end`.

    SwAV, DINO and SSLight use it for the learning rate, DINO also for the weight decay and the EMA
    rate. The warm-up includes both end points, so two successive steps have the value `peak`. The
    value `end` belongs to step `total_steps`, one after the last step of the run.
    """
    rest = max(total_steps - warmup_steps, 1)

    def value(step: Array) -> Array:
        decay = jnp.square(jnp.sin(jnp.pi / 2 * _fraction(rest + warmup_steps - step, rest)))
        ramp = start + (peak - start) * _fraction(step, max(warmup_steps - 1, 1))
        return jnp.where(step < warmup_steps, ramp, end + (peak - end) * decay)

    return value


def line(start: float, end: float, count: int) -> Schedule:
    """Returns a linear schedule: `count` values from `start` to `end` inclusive, then `end`.

    DINO uses it for the temperature of its targets.
    """

    def value(step: Array) -> Array:
        ramp = start + (end - start) * _fraction(step, max(count - 1, 1))
        return jnp.where(step < count, ramp, end)

    return value


def _fraction(step: Array, total: int) -> Array:
    return jnp.asarray(step, jnp.float32) / total
