"""Summaries of the metrics of several steps, and checks for values that are not finite."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from disco_jax.errors import NumericError
from disco_jax.train.health import PREFIX, STD, effective_rank

_REMEDY = "Try a lower config.learning_rate.base_lr or config.dtype=float32."


def summarise(window: Sequence[Mapping[str, jax.Array]], step: int) -> dict[str, float]:
    """Averages each metric over the last steps, and adds the newest health signals.

    The Gram matrix among these signals is reduced to its effective rank; see `health.measured`.

    Args:
      window: metrics of consecutive steps, still on the device, up to those of `step`.
      step: number of the last step.

    Raises:
      NumericError: a value is not finite; names the metrics and the first such step.
    """
    fetched = jax.device_get([_without_health(metrics) for metrics in window])
    for i, metrics in enumerate(fetched):
        bad = sorted(key for key, value in metrics.items() if not np.isfinite(value).all())
        if bad:
            first = step - len(fetched) + 1 + i
            raise NumericError(
                f"Not finite at step {first}: {', '.join(bad)}. The last good checkpoint is kept. "
                + _REMEDY
            )
    means = {key: float(np.mean([metrics[key] for metrics in fetched])) for key in fetched[-1]}
    return means | _newest_health(window)


def check_state(step: int, state: Any) -> None:
    """Checks that all arrays of a state are finite before it is saved.

    Finite losses do not imply a finite state, since they were computed before the update.

    Args:
      step: number of the step that returned the state.
      state: a tree of arrays.

    Raises:
      NumericError: names the first arrays that are not finite.
    """
    bad = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(np.asarray(leaf)).all()
    ]
    if bad:
        raise NumericError(
            f"Not finite after step {step}: {', '.join(bad[:3])} ({len(bad)} arrays). The last "
            f"good checkpoint is kept. {_REMEDY}"
        )


def _without_health(metrics: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {key: value for key, value in metrics.items() if not key.startswith(PREFIX)}


def _newest_health(window: Sequence[Mapping[str, jax.Array]]) -> dict[str, float]:
    """Returns the signals of the last step that measured them; {} if no step in `window` did."""
    stds = jax.device_get([metrics.get(STD, np.nan) for metrics in window])
    measured = np.flatnonzero(np.isfinite(stds))
    if not len(measured):
        return {}
    newest = window[measured[-1]]
    signals = jax.device_get({k: value for k, value in newest.items() if k.startswith(PREFIX)})
    return {k: effective_rank(v) if np.ndim(v) else float(v) for k, v in signals.items()}
