"""Optimizers and learning rates from a config."""

from typing import Any

import optax

from disco_jax import errors
from disco_jax.ops import schedules
from disco_jax.ops.schedules import Schedule

DECAYS = ("cosine", "cosine_after", "steps", "constant")


def learning_rate(spec: Any, batch_size: int, steps_per_epoch: int, total_epochs: int) -> Schedule:
    """The learning rate as a function of the step.

    Args:
      spec: fields `per_256` (the peak at a global batch of 256, scaled linearly), `decay`
        ("cosine": of the whole run, to 0; "cosine_after": of what follows the warm-up, to
        `minimum`, which is not scaled; "steps"; "constant"), `every` ("epoch": constant inside an
        epoch, as MoCo, DisCo and SEED do; "step"), `milestones` (epochs) and `factor` of "steps",
        `warmup_epochs`, and `warmup_from`, the rate at step 0 (not scaled).
      batch_size: over all devices of all hosts.
      steps_per_epoch: steps an epoch.
      total_epochs: length of the run.

    Raises:
      UserError: for a decay or a period that is not known.
    """
    peak = spec.per_256 * batch_size / 256
    total = total_epochs * steps_per_epoch
    if spec.decay == "cosine_after":
        start, warm = spec.warmup_from, round(spec.warmup_epochs * steps_per_epoch)
        schedule = schedules.cosine_after(start, peak, spec.minimum, warm, total)
    elif spec.decay == "cosine":
        schedule = schedules.cosine(peak, total)
    elif spec.decay == "steps":
        milestones = [epoch * steps_per_epoch for epoch in spec.milestones]
        schedule = schedules.steps(peak, milestones, spec.factor)
    elif spec.decay == "constant":
        schedule = schedules.constant(peak)
    else:
        raise errors.unknown("config.learning_rate.decay", spec.decay, DECAYS)
    if spec.warmup_epochs and spec.decay != "cosine_after":
        warmup_steps = spec.warmup_epochs * steps_per_epoch
        schedule = schedules.warmup(schedule, spec.warmup_from, peak, warmup_steps)
    if spec.every == "epoch":
        return schedules.per_epoch(schedule, steps_per_epoch)
    if spec.every != "step":
        raise errors.unknown("config.learning_rate.every", spec.every, ("epoch", "step"))
    return schedule


def build(spec: Any, rate: Schedule) -> optax.GradientTransformation:
    """The optimizer of a config's `optimizer`, following the learning rate `rate`.

    "sgd" is PyTorch's: g <- g + wd p; v <- mu v + g; p <- p - lr v, with the weight decay on
    every parameter, BatchNorm's and biases too, as MoCo, DisCo and SEED train. With the optional
    field `nesterov` it looks ahead as PyTorch's does: p <- p - lr (g + mu v).

    Raises:
      UserError: for an optimizer that is not known.
    """
    if spec.name != "sgd":
        raise errors.unknown("config.optimizer.name", spec.name, ("sgd",))
    return optax.chain(
        optax.add_decayed_weights(spec.weight_decay),
        optax.sgd(rate, momentum=spec.momentum, nesterov=spec.get("nesterov", False)),
    )
