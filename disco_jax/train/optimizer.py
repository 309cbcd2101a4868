"""Optimizers and learning-rate schedules built from a config."""

import fnmatch
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from ml_collections import ConfigDict

from disco_jax import errors
from disco_jax.ops import schedules
from disco_jax.ops.schedules import Schedule
from disco_jax.ops.vectors import l2_normalize

DECAYS = ("cosine", "cosine_after", "steps", "constant")
NAMES = ("sgd", "larc", "lars", "adamw")
# Defaults of fields that a spec may lack, as a probe's does.
_DEFAULTS = dict(
    nesterov=False,
    weight_decay_end=-1.0,
    trust=1e-3,
    no_decay=(),
    no_trust=(),
    clip=0.0,
    frozen_until=(),
    frozen_steps=0,
    frozen_epochs=0,
    frozen=(),
    unit_norm=(),
)


def learning_rate(spec: Any, batch_size: int, steps_per_epoch: int, total_epochs: int) -> Schedule:
    """Builds the learning rate as a function of the step.

    Args:
      spec: with these fields:
        base_lr: peak at a global batch of 256; scaled linearly with the batch size.
        decay: "cosine" over the whole run, to 0; "cosine_after" the warm-up, to `minimum`;
        "steps"; "constant".
        minimum: final rate of "cosine_after", not scaled.
        every: "epoch" keeps the rate constant within an epoch, as MoCo, DisCo and SEED do; or
        "step".
        milestones, factor: of "steps"; the milestones are in epochs.
        warmup_epochs: length of the linear warm-up.
        warmup_from: rate at step 0, not scaled.
      batch_size: over all devices of all hosts.
      steps_per_epoch: number of steps in an epoch.
      total_epochs: length of the run.

    Raises:
      UserError: for an unknown `decay` or `every`.
    """
    peak = spec.base_lr * batch_size / 256
    total = total_epochs * steps_per_epoch
    warmup_steps = round(spec.warmup_epochs * steps_per_epoch)
    if spec.decay == "cosine_after":
        start = spec.warmup_from
        schedule = schedules.cosine_after(start, peak, spec.minimum, warmup_steps, total)
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
        schedule = schedules.warmup(schedule, spec.warmup_from, peak, warmup_steps)
    if spec.every == "epoch":
        return schedules.per_epoch(schedule, steps_per_epoch)
    if spec.every != "step":
        raise errors.unknown("config.learning_rate.every", spec.every, ("epoch", "step"))
    return schedule


def ema_rate(spec: Any, total_steps: int) -> Schedule:
    """Builds the decay of the momentum network's EMA as a function of the step.

    Args:
      spec: with the fields `ema_rate` (value at step 0) and `ema_rate_end` (value at the end of
        the run, reached by half a cosine; 1 in DINO and BYOL; -1 keeps the rate constant).
      total_steps: length of the run.
    """
    if spec.ema_rate_end < 0:
        return schedules.constant(spec.ema_rate)
    return schedules.cosine_after(0.0, spec.ema_rate, spec.ema_rate_end, 0, total_steps)


def build(
    spec: Any, rate: Schedule, steps_per_epoch: int = 1, total_epochs: int = 1
) -> optax.GradientTransformation:
    """Builds the optimizer of `config.optimizer` with the learning rate `rate`.

    With g the gradient, p a parameter, wd the weight decay and eta the trust coefficient:
    "sgd" is PyTorch's: g <- g + wd p; v <- mu v + g; p <- p - lr v. Weight decay applies to every
    parameter including BatchNorm's and biases, as in MoCo, DisCo and SEED. With `nesterov`:
    p <- p - lr (g + mu v).
    "larc" is SwAV's, which is apex's without clipping: g <- (g + wd p) eta |p| / (|g| + wd |p| +
    1e-8) for every parameter, g unchanged where |p| or |g| is 0, then "sgd" without decay.
    "lars" is DINO's and SSLight's (arXiv:1708.03888): d = g + wd p, d <- d eta |p| / |d|, factor 1
    where a norm is 0, then v <- mu v + d.
    "adamw" is PyTorch's (arXiv:1711.05101), betas 0.9 and 0.999.

    Args:
      spec: fields name, momentum, weight_decay, and these optional ones (see `_DEFAULTS`):
        weight_decay_end: value at the end of the run, reached by half a cosine; -1: constant.
        trust: eta.
        no_decay, no_trust: kinds of parameters without weight decay or without the factor of
        "lars": "vectors" (biases, norms), "depthwise" (kernels of depthwise convolutions).
        clip: maximum norm of each parameter's gradient, clipped separately (DINO); 0: none.
        frozen_until: patterns of parameters that are not updated for the first frozen_steps or
        frozen_epochs. Their moments are not updated either, as in PyTorch, which skips parameters
        without a gradient.
        frozen: patterns of parameters that are never trained.
        unit_norm: patterns of kernels whose columns are scaled to length 1 after every step.
        Patterns are shell-style wildcards for paths such as "prototypes/kernel0".
      rate: step -> learning rate.
      steps_per_epoch: for frozen_epochs and the weight decay's cosine.
      total_epochs: for the weight decay's cosine.

    Raises:
      UserError: for an unknown optimizer or kind of parameters, for contradictory durations, and,
        in `init`, for a pattern that matches no parameter.
    """
    values = ConfigDict({**_DEFAULTS, **{field: spec[field] for field in spec}})
    _check(values)
    decay = values.weight_decay
    if values.weight_decay_end >= 0:
        total = steps_per_epoch * total_epochs
        decay = schedules.cosine_after(0.0, decay, values.weight_decay_end, 0, total)
    tx = _chain(values, rate, decay)
    late = values.frozen_steps or values.frozen_epochs * steps_per_epoch
    if (values.frozen_until and late) or values.frozen:
        groups = {
            "free": tx,
            "late": _delayed_chain(values, rate, decay, late),
            "fixed": optax.set_to_zero(),
        }
        tx = optax.partition(groups, lambda params: _groups(values, params, bool(late)))
    if values.unit_norm:
        tx = optax.chain(tx, _unit_columns(values.unit_norm))
    return tx


def _chain(spec: Any, rate: Schedule, decay: float | Schedule) -> optax.GradientTransformation:
    """Builds the optimizer of one group of parameters."""
    steps = [_clip_each(spec.clip)] if spec.clip else []
    mask = None
    if spec.no_decay:
        mask = functools.partial(_without, spec.no_decay)
    decayed = optax.add_decayed_weights(decay, mask)
    if spec.name == "sgd":
        return optax.chain(
            *steps, decayed, optax.sgd(rate, momentum=spec.momentum, nesterov=spec.nesterov)
        )
    if spec.name == "adamw":
        steps += [optax.scale_by_adam(), decayed]
    elif spec.name == "lars":
        scaled = optax.masked(_trust(spec.trust), functools.partial(_without, spec.no_trust))
        steps += [decayed, scaled, optax.trace(spec.momentum)]
    else:
        assert not callable(decay), "`_check` refuses a schedule"
        steps += [_larc(spec.trust, decay), optax.trace(spec.momentum)]
    return optax.chain(*steps, optax.scale_by_learning_rate(rate))


def _delayed_chain(
    spec: Any, rate: Schedule, decay: float | Schedule, start: float
) -> optax.GradientTransformation:
    """Builds `_chain` with zero updates and an unchanged state before step `start`."""

    def shifted(schedule: Schedule) -> Schedule:  # the inner counters are 0 at step `start`
        return lambda step: schedule(step + math.ceil(start))

    inner = _chain(spec, shifted(rate), shifted(decay) if callable(decay) else decay)
    return optax.conditionally_mask(inner, lambda step: step >= start)


def _larc(trust: float, decay: float) -> optax.GradientTransformation:
    """Decays and scales the gradient of every parameter as apex's LARC does without clipping."""

    def scale(gradient: Array, param: Array) -> Array:
        param_norm = jnp.linalg.norm(param.ravel())
        gradient_norm = jnp.linalg.norm(gradient.ravel())
        factor = trust * param_norm / (gradient_norm + decay * param_norm + 1e-8)
        nonzero = (param_norm != 0) & (gradient_norm != 0)
        return jnp.where(nonzero, factor * (gradient + decay * param), gradient)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, params))


def _trust(trust: float) -> optax.GradientTransformation:
    """Scales decayed gradients by the layer-wise factor of LARS (arXiv:1708.03888)."""

    def scale(update: Array, param: Array) -> Array:
        param_norm, update_norm = jnp.linalg.norm(param.ravel()), jnp.linalg.norm(update.ravel())
        nonzero = (param_norm > 0) & (update_norm > 0)
        factor = trust * param_norm / jnp.where(nonzero, update_norm, 1.0)
        return update * jnp.where(nonzero, factor, 1.0)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, params))


def _clip_each(max_norm: float) -> optax.GradientTransformation:
    """Clips the gradient of each parameter to the norm `max_norm`, as DINO's code does."""

    def clip(gradient: Array) -> Array:
        norm = jnp.linalg.norm(gradient.ravel())
        return gradient * jnp.minimum(max_norm / (norm + 1e-6), 1.0)

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))


def _unit_columns(patterns: Sequence[str]) -> optax.GradientTransformation:
    """Corrects updates so that the columns of matching kernels have length 1 after them."""

    def correct(path: str, update: Array, param: Array) -> Array:
        if not _matches(path, patterns):
            return update
        return l2_normalize((param + update).T).T - param

    def update(updates: Any, params: Any) -> Any:
        _require_matches(patterns, params, "unit_norm")
        return _by_path(correct, updates, params)

    return optax.stateless(update)


def _groups(spec: Any, params: Any, late: bool) -> Any:
    """Returns the group of every parameter: "free", "late" or "fixed"."""
    for field in ("frozen_until", "frozen"):
        _require_matches(spec[field], params, field)

    def group(path: str, _: Array) -> str:
        if _matches(path, spec.frozen):
            return "fixed"
        return "late" if late and _matches(path, spec.frozen_until) else "free"

    return _by_path(group, params)


def check_patterns(spec: Any, params: Any) -> None:
    """Checks that every pattern of `frozen`, `frozen_until` and `unit_norm` matches some parameter.

    Raises:
      UserError: names the pattern and a few parameters.
    """
    for field in ("frozen", "frozen_until", "unit_norm"):
        _require_matches(spec[field], params, field)


def _require_matches(patterns: Sequence[str], params: Any, field: str) -> None:
    paths = jax.tree.leaves(_by_path(lambda path, _: path, params))
    for pattern in patterns:
        if not _matches_any(pattern, paths):
            raise errors.UserError(
                f"config.optimizer.{field}={tuple(patterns)!r}: {pattern!r} matches no parameter. "
                f"Some of the parameters are: {', '.join(paths[-3:])}."
            )


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _matches_any(pattern: str, paths: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for path in paths)


def _without(kinds: Sequence[str], params: Any) -> Any:
    """Returns for each parameter whether it belongs to none of `kinds`."""
    return _by_path(lambda path, x: not any(KINDS[kind](path, x) for kind in kinds), params)


def _is_vector(path: str, param: Array) -> bool:
    # The scale of weight-normed prototypes has two axes in PyTorch, so it is decayed there.
    return param.ndim < 2 and not path.startswith("prototypes/scale")


def _is_depthwise(path: str, param: Array) -> bool:
    return param.ndim == 4 and param.shape[2] == 1


KINDS = {"vectors": _is_vector, "depthwise": _is_depthwise}


def _by_path(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps `function("prototypes/kernel0", leaf, ...)` over the leaves of a tree."""

    def call(path: Any, *leaves: Any) -> Any:
        return function(jax.tree_util.keystr(path, simple=True, separator="/"), *leaves)

    return jax.tree_util.tree_map_with_path(call, tree, *rest)


def _check(spec: Any) -> None:
    """Raises UserError if a field is unknown or contradicts another one."""
    if spec.name not in NAMES:
        raise errors.unknown("config.optimizer.name", spec.name, NAMES)
    for field in ("no_decay", "no_trust"):
        for kind in spec[field]:
            if kind not in KINDS:
                raise errors.unknown(f"config.optimizer.{field}", kind, KINDS)
    if spec.frozen_steps and spec.frozen_epochs:
        raise errors.UserError(
            f"config.optimizer.frozen_steps={spec.frozen_steps} and config.optimizer."
            f"frozen_epochs={spec.frozen_epochs} both set the duration of config.optimizer."
            "frozen_until. Set one of them to 0."
        )
    if spec.name == "larc" and (spec.weight_decay_end >= 0 or spec.no_decay):
        raise errors.UserError(
            "config.optimizer.name='larc' decays every parameter at a constant rate. Set "
            "config.optimizer.weight_decay_end=-1 and config.optimizer.no_decay=(), or use 'lars'."
        )
