"""Optimizers and learning-rate schedules built from a config."""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from disco_jax import errors, typed
from disco_jax.ops import schedules
from disco_jax.ops.schedules import Schedule
from disco_jax.ops.vectors import l2_normalize

DECAYS = ("cosine", "cosine_after", "steps", "constant")
NAMES = ("sgd", "larc", "lars", "adamw")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Settings of the optimizer, the section `config.optimizer`.

    Patterns are shell-style wildcards for paths of parameters.

    Attributes:
      name: sgd | larc | lars | adamw
      momentum: of all optimizers but adamw
      weight_decay: weight decay; `weight_decay_end` makes it a schedule
      weight_decay_end: weight decay at the end of the run, along half a cosine; -1: same
      no_decay: kinds of parameters without weight decay: "vectors", "depthwise"
      trust: trust coefficient of larc and lars
      no_trust: kinds of parameters without the trust ratio of lars
      clip: largest norm of each parameter's gradient; 0: no clipping
      frozen_until: patterns of parameters, such as "prototypes/*", frozen at first
      frozen_steps: steps for which `frozen_until` holds; set this or frozen_epochs
      frozen_epochs: epochs for which `frozen_until` holds
      frozen: patterns of parameters that are never trained
      unit_norm: patterns of kernels whose columns are scaled to length 1 after each step
      nesterov: Nesterov's momentum, of sgd only; a field of evaluations
    """

    name: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    weight_decay_end: float = -1.0
    no_decay: tuple[str, ...] = ()
    trust: float = 1e-3
    no_trust: tuple[str, ...] = ()
    clip: float = 0.0
    frozen_until: tuple[str, ...] = ()
    frozen_steps: int = 0
    frozen_epochs: int = 0
    frozen: tuple[str, ...] = ()
    unit_norm: tuple[str, ...] = ()
    nesterov: bool = typed.optional(False)

    @property
    def patterns(self) -> dict[str, tuple[str, ...]]:
        """Field -> patterns, of the fields that select parameters by their paths."""
        return {name: getattr(self, name) for name in ("frozen", "frozen_until", "unit_norm")}


@dataclasses.dataclass(frozen=True)
class RateSettings:
    """Settings of the learning rate, the section `config.learning_rate`.

    Attributes:
      base_lr: peak for a global batch of 256; scales linearly with the batch
      decay: cosine (over the whole run) | cosine_after (from the end of the warm-up to `minimum`)
        | steps | constant
      every: the rate changes once an epoch, or every step
      milestones: epochs at which "steps" multiplies the rate by `factor`
      factor: factor of the rate at each milestone
      minimum: last rate of "cosine_after"; does not scale with the batch
      warmup_epochs: length of a linear warm-up from warmup_from to the peak
      warmup_from: rate at step 0; does not scale with the batch
    """

    base_lr: float = 0.03
    decay: str = "cosine"
    every: str = "epoch"
    milestones: tuple[int, ...] = ()
    factor: float = 0.1
    minimum: float = 0.0
    warmup_epochs: int = 0
    warmup_from: float = 0.0


def learning_rate(
    settings: RateSettings, batch_size: int, steps_per_epoch: int, total_epochs: int
) -> Schedule:
    """Builds the learning rate as a function of the step.

    Args:
      settings: `every="epoch"` keeps the rate constant within an epoch, as MoCo, DisCo and SEED do.
      batch_size: over all devices of all hosts.
      steps_per_epoch: number of steps in an epoch.
      total_epochs: length of the run.

    Raises:
      UserError: for an unknown `decay` or `every`.
    """
    peak = settings.base_lr * batch_size / 256
    total = total_epochs * steps_per_epoch
    warmup_steps = round(settings.warmup_epochs * steps_per_epoch)
    if settings.decay == "cosine_after":
        start = settings.warmup_from
        schedule = schedules.cosine_after(start, peak, settings.minimum, warmup_steps, total)
    elif settings.decay == "cosine":
        schedule = schedules.cosine(peak, total)
    elif settings.decay == "steps":
        milestones = [epoch * steps_per_epoch for epoch in settings.milestones]
        schedule = schedules.steps(peak, milestones, settings.factor)
    elif settings.decay == "constant":
        schedule = schedules.constant(peak)
    else:
        raise errors.unknown("config.learning_rate.decay", settings.decay, DECAYS)
    if settings.warmup_epochs and settings.decay != "cosine_after":
        schedule = schedules.warmup(schedule, settings.warmup_from, peak, warmup_steps)
    if settings.every == "epoch":
        return schedules.per_epoch(schedule, steps_per_epoch)
    if settings.every != "step":
        raise errors.unknown("config.learning_rate.every", settings.every, ("epoch", "step"))
    return schedule


def ema_rate(start: float, end: float, total_steps: int) -> Schedule:
    """Builds the decay of the momentum network's EMA as a function of the step.

    Args:
      start: value at step 0.
      end: value at the end of the run, reached by half a cosine, 1 in DINO and BYOL; -1 keeps the
        rate constant.
      total_steps: length of the run.
    """
    if end < 0:
        return schedules.constant(start)
    return schedules.cosine_after(0.0, start, end, 0, total_steps)


def build(
    settings: OptimizerSettings,
    rate: Schedule,
    steps_per_epoch: int = 1,
    total_epochs: int = 1,
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
      settings: `trust` is eta. "vectors" in `no_decay` and `no_trust` are biases and the parameters
        of norms, "depthwise" the kernels of depthwise convolutions. `clip` clips each parameter's
        gradient separately, as DINO does. The moments of parameters in `frozen_until` are not
        updated either, as in PyTorch, which skips parameters without a gradient.
      rate: step -> learning rate.
      steps_per_epoch: for frozen_epochs and the weight decay's cosine.
      total_epochs: for the weight decay's cosine.

    Raises:
      UserError: for an unknown optimizer or kind of parameters, for contradictory durations, and,
        in `init`, for a pattern that matches no parameter.
    """
    _check(settings)
    first, last = settings.weight_decay, settings.weight_decay_end
    decay: float | Schedule = first
    if last >= 0:
        decay = schedules.cosine_after(0.0, first, last, 0, steps_per_epoch * total_epochs)
    tx = _chain(settings, rate, decay)
    late = settings.frozen_steps or settings.frozen_epochs * steps_per_epoch
    if (settings.frozen_until and late) or settings.frozen:
        groups = {
            "free": tx,
            "late": _delayed_chain(settings, rate, decay, late),
            "fixed": optax.set_to_zero(),
        }
        tx = optax.partition(groups, lambda params: _groups(settings, params, bool(late)))
    if settings.unit_norm:
        tx = optax.chain(tx, _unit_columns(settings.unit_norm))
    return tx


def _chain(
    settings: OptimizerSettings, rate: Schedule, decay: float | Schedule
) -> optax.GradientTransformation:
    """Builds the optimizer of one group of parameters."""
    steps = [_clip_each(settings.clip)] if settings.clip else []
    mask = None
    if settings.no_decay:
        mask = functools.partial(_without, settings.no_decay)
    decayed = optax.add_decayed_weights(decay, mask)
    if settings.name == "sgd":
        return optax.chain(
            *steps, decayed, optax.sgd(rate, momentum=settings.momentum, nesterov=settings.nesterov)
        )
    if settings.name == "adamw":
        steps += [optax.scale_by_adam(), decayed]
    elif settings.name == "lars":
        scaled = optax.masked(
            _trust(settings.trust), functools.partial(_without, settings.no_trust)
        )
        steps += [decayed, scaled, optax.trace(settings.momentum)]
    else:
        assert not callable(decay), "`_check` refuses a schedule"
        steps += [_larc(settings.trust, decay), optax.trace(settings.momentum)]
    return optax.chain(*steps, optax.scale_by_learning_rate(rate))


def _delayed_chain(
    settings: OptimizerSettings, rate: Schedule, decay: float | Schedule, start: float
) -> optax.GradientTransformation:
    """Builds `_chain` with zero updates and an unchanged state before step `start`."""

    def shifted(schedule: Schedule) -> Schedule:  # the inner counters are 0 at step `start`
        return lambda step: schedule(step + math.ceil(start))

    inner = _chain(settings, shifted(rate), shifted(decay) if callable(decay) else decay)
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


def _groups(settings: OptimizerSettings, params: Any, late: bool) -> Any:
    """Returns the group of every parameter: "free", "late" or "fixed"."""
    for field in ("frozen_until", "frozen"):
        _require_matches(settings.patterns[field], params, field)

    def group(path: str, _: Array) -> str:
        if _matches(path, settings.frozen):
            return "fixed"
        return "late" if late and _matches(path, settings.frozen_until) else "free"

    return _by_path(group, params)


def check_patterns(settings: OptimizerSettings, params: Any) -> None:
    """Checks that every pattern of `frozen`, `frozen_until` and `unit_norm` matches some parameter.

    Raises:
      UserError: names the pattern and a few parameters.
    """
    for field, patterns in settings.patterns.items():
        _require_matches(patterns, params, field)


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


def _check(settings: OptimizerSettings) -> None:
    """Raises UserError if a field is unknown or contradicts another one."""
    if settings.name not in NAMES:
        raise errors.unknown("config.optimizer.name", settings.name, NAMES)
    for field, kinds in (("no_decay", settings.no_decay), ("no_trust", settings.no_trust)):
        for kind in kinds:
            if kind not in KINDS:
                raise errors.unknown(f"config.optimizer.{field}", kind, KINDS)
    if settings.frozen_steps and settings.frozen_epochs:
        raise errors.UserError(
            f"config.optimizer.frozen_steps={settings.frozen_steps} and config.optimizer."
            f"frozen_epochs={settings.frozen_epochs} both set the duration of config.optimizer."
            "frozen_until. Set one of them to 0."
        )
    if settings.name == "larc" and (settings.weight_decay_end >= 0 or settings.no_decay):
        raise errors.UserError(
            "config.optimizer.name='larc' decays every parameter at a constant rate. Set "
            "config.optimizer.weight_decay_end=-1 and config.optimizer.no_decay=(), or use 'lars'."
        )
