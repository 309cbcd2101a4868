"""Schedules: step -> scalar, traced inside the step."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array

Schedule = Callable[[Array], Array]


def constant(value: float) -> Schedule:
    """The same value at every step."""
    return lambda step: jnp.full((), value, jnp.float32)


def per_epoch(schedule: Schedule, steps_per_epoch: int) -> Schedule:
    """`schedule` of the whole epochs passed: constant inside an epoch, as the papers' codes do."""
    return lambda step: schedule(step // steps_per_epoch * steps_per_epoch)


def cosine(peak: float, total_steps: int) -> Schedule:
    """peak / 2 (1 + cos(pi step / total)): from `peak` at step 0 towards 0 at `total_steps`.

    Written as the square of a sine of what remains, which is exact in float32 near the end too.
    """

    def value(step: Array) -> Array:
        return peak * jnp.square(jnp.sin(jnp.pi / 2 * _fraction(total_steps - step, total_steps)))

    return value


def steps(peak: float, milestones: Sequence[int], factor: float) -> Schedule:
    """`peak`, times `factor` from each milestone (a step number) on."""
    return lambda step: (
        peak * jnp.prod(jnp.where(step >= jnp.asarray(milestones, jnp.int32), factor, 1.0))
    )


def warmup(schedule: Schedule, start: float, peak: float, warmup_steps: int) -> Schedule:
    """A straight line from `start` at step 0 to `peak`, then `schedule`, which is not shifted.

    SEED's and DINO's schedules do not restart after the warm-up: the cosine is that of the whole
    run, seen from `warmup_steps` on.
    """

    def value(step: Array) -> Array:
        line = start + (peak - start) * _fraction(step, max(warmup_steps, 1))
        return jnp.where(step < warmup_steps, line, schedule(step))

    return value


def cosine_after(
    start: float, peak: float, end: float, warmup_steps: int, total_steps: int
) -> Schedule:
    """A line from `start` to `peak`, both included, then half a cosine from `peak` to `end`.

    What SwAV, DINO and SSLight use for the learning rate and DINO for the weight decay and the EMA
    rate too. As the line includes its end, `peak` is taken twice: in its last step and in the
    next. `end` would be taken in the step after the last, `total_steps`.
    """
    rest = max(total_steps - warmup_steps, 1)

    def value(step: Array) -> Array:
        left = jnp.square(jnp.sin(jnp.pi / 2 * _fraction(rest + warmup_steps - step, rest)))
        line = start + (peak - start) * _fraction(step, max(warmup_steps - 1, 1))
        return jnp.where(step < warmup_steps, line, end + (peak - end) * left)

    return value


def _fraction(step: Array, total: int) -> Array:
    return jnp.asarray(step, jnp.float32) / total
